"""From a long prompt that works to a student that does without it: `tunesmith distill`.

The teacher (an endpoint, or a model here with the long prompt) answers plain inputs; answers that may be imitated
become an ordinary file of prompts and completions; `run` trains the student on it and judges it against the teacher on
test inputs. Answers live beside the run folder, in `<out>-teacher/`, so that deleting a run throws none away.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..data.chance import in_order
from ..data.curate import SPLITS, curate
from ..data.files import records
from ..data.layout import PROMPT_ONLY, as_dict, find_columns, is_prompt_only
from ..data.read import BUILTIN, read, read_choices
from ..data.split import split
from ..data.store import stored_rows
from ..errors import DataError, RecipeError
from ..evaluate.metrics import MODEL_METRICS, find_metric
from ..evaluate.systems import takes_system
from ..folder import RunFolder, locked, write_jsonl
from ..model.endpoint import Endpoint, Question, Reply, answer_all, check_url
from ..model.load import Vocabulary, load, load_vocabulary, resolve
from ..recipe import DataSpec, Recipe
from ..screen import Screen
from ..types import Conversation, LedgerEntry
from ..world import World
from .begin import needs_held_out
from .prepare import questions as graded_questions
from .run import run
from .teacher import (
    Checks,
    answered,
    ask_model,
    checks_of,
    collect,
    count_prompt,
    is_remote,
    prompting_of,
    questions_for,
    read_answers,
    spent,
    unanswered,
    why_not,
)

MOST_COUNTED = 500  # prompts that the plan tokenizes; the others are like them
Asked = list[tuple[Conversation, list[Question]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """All that was read and checked, and what is still to be asked: so many `requests`, each of about `prompt_tokens`.

    `costs_money` where somebody may send a bill.
    """

    recipe: Recipe
    root: Path
    folder: Path
    asked: Mapping[str, Asked]
    ledger: Sequence[LedgerEntry]
    checks: Checks
    endpoint: Endpoint | None
    vocabulary: Vocabulary
    requests: int
    prompt_tokens: float
    costs_money: bool


def plan_distillation(recipe: Recipe, screen: Screen, root: Path = Path()) -> Distillation:
    """Read and check everything, and show what collecting will take; asks nothing. Raises TunesmithError."""
    _check(recipe, root)
    folder = Path(f"{recipe.out or 'runs/run'}-teacher")
    endpoint = _endpoint(recipe) if is_remote(recipe) else None
    vocabulary = load_vocabulary(recipe.base)
    screen.stage("Inputs", recipe.data.train)
    rows, ledger = _inputs(recipe)
    teacher_reads_system = endpoint is not None or takes_system(load_vocabulary(recipe.task.teacher.by).tokenizer)
    prompting = prompting_of(recipe, root, teacher_reads_system)
    samples = {"train": recipe.task.teacher.agreement, "valid": recipe.task.teacher.agreement, "test": 1}
    asked = {
        name: list(zip(part, questions_for(recipe, prompting, part, samples[name]), strict=True))
        for name, part in rows.items()
    }
    questions = _questions(asked)
    some = questions[:: max(1, len(questions) // MOST_COUNTED)]
    plan = Distillation(
        recipe=recipe,
        root=root,
        folder=folder,
        asked=asked,
        ledger=ledger,
        checks=checks_of(recipe, root),
        endpoint=endpoint,
        vocabulary=vocabulary,
        requests=len(unanswered(questions, read_answers(folder / "answers.jsonl"))),
        prompt_tokens=float(np.mean([count_prompt(question.messages, vocabulary) for question in some])),
        costs_money=recipe.task.teacher.price is not None or (endpoint is not None and not endpoint.is_local),
    )
    _show(plan, screen)
    return plan


def distill(plan: Distillation, world: World, screen: Screen) -> RunFolder:
    """Collect, filter, and hand over to `run`; the same command goes on after a stop. Raises TunesmithError."""
    recipe, folder = plan.recipe, plan.folder
    if world.leads:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(RunFolder(path=folder)):
            collected = _collected(plan, screen)
            facts = _write(plan, collected, screen)
    else:
        facts = {}
    world.barrier()
    return run(_student(recipe, folder), world, screen=screen, root=plan.root, taught=facts)


def _check(recipe: Recipe, root: Path) -> None:
    """Raises RecipeError for a recipe that names no teacher, or nothing to distil, or that `run` would refuse later."""
    spec, prompted = recipe.task.teacher, bool(recipe.task.instructions or recipe.task.teacher.shots)
    if not spec.by:
        fix = "Name a base, a finished run, or an OpenAI-compatible URL that ends in /v1."
        raise RecipeError("there is no teacher", where="task.teacher.by", fix=fix)
    if recipe.method != "sft":
        raise RecipeError(f"the student imitates, so method {recipe.method} has no use", where="method", fix="Use sft.")
    if recipe.task.metric in MODEL_METRICS:
        fix = "Choose a metric of answers, such as normalised_match, rouge_l or file.py:function."
        raise RecipeError(
            f"a teacher gives answers, which {recipe.task.metric} cannot grade", where="task.metric", fix=fix
        )
    if is_remote(recipe) and not spec.model:
        raise RecipeError(
            "an endpoint serves models by name", where="task.teacher.model", fix="Name the teacher's model."
        )
    if not prompted and not is_remote(recipe) and resolve(spec.by) == resolve(recipe.base):
        fix = "Give the prompt that works in task.instructions, or examples in task.teacher.shots, or another teacher."
        raise RecipeError(
            "the teacher is the student without a prompt, so nothing can be learnt", where="task.teacher", fix=fix
        )
    if spec.agreement > 1 and spec.temperature == 0:
        fix = "Leave task.teacher.temperature out, or raise it."
        raise RecipeError("answers drawn at temperature 0 always agree", where="task.teacher.agreement", fix=fix)
    needs_held_out(recipe)
    for name in recipe.task.also:
        find_metric(name, recipe.task, root)
    if recipe.evaluate.retention:
        read_choices(recipe.evaluate.retention)


def _endpoint(recipe: Recipe) -> Endpoint:
    spec = recipe.task.teacher
    check_url(spec.by)
    key = os.environ.get(spec.key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        fix = f"Set {spec.key_env} again; a key has letters, digits and signs only."
        raise RecipeError("the key holds characters that no header can carry", where="task.teacher.key_env", fix=fix)
    return Endpoint(
        url=spec.by,
        model=spec.model,
        key=key,
        key_name=spec.key_env,
        requests_per_minute=spec.requests_per_minute,
        parallel=spec.parallel,
    )


def _inputs(recipe: Recipe) -> tuple[dict[str, list[Conversation]], Sequence[LedgerEntry]]:
    """Inputs by split, each once, no more held-out ones than will be used. Raises DataError."""
    spec = recipe.data
    files = {name: part for name in ("valid", "test") if isinstance(part := getattr(spec, name), str)}
    shares = spec.model_copy(update=dict.fromkeys(files, 0.0))
    whole = split(read(spec.train, _layout(spec.train, spec)), shares)
    held_out = {name: in_order(stored_rows(read(file, _layout(file, spec))), spec.seed) for name, file in files.items()}
    kept, ledger = curate(replace(whole, **held_out), spec)
    most = {"train": None, "valid": recipe.evaluate.valid_rows, "test": recipe.evaluate.rows}
    rows: dict[str, list[Conversation]] = {}
    for name in SPLITS:
        rows[name] = []
        for row in getattr(kept, name)[: most[name]]:
            if not isinstance(row, Conversation) or not row.prompt:
                fix = "Give rows with a prompt; an answer may stand beside it."
                raise DataError("the row is no input that a teacher can answer", where=row.source, fix=fix)
            if row.tools or any(message.tool_calls for message in row.prompt):
                fix = "Leave the tools and their calls out."
                raise DataError("a teacher is not sent tools", where=row.source, fix=fix)
            if name == "test" and row.completion:
                graded_questions([row], recipe.task)
            rows[name].append(row)
    return rows, ledger


def _layout(source: str, spec: DataSpec) -> DataSpec:
    """The recipe's way to read a file; a prompt beside other columns, none of which is an answer, is an input here."""
    if spec.layout != "auto" or source.startswith(BUILTIN):
        return spec
    for where, fields in islice(records(source), 1):
        with suppress(DataError):
            find_columns(list(fields), spec, where)
            return spec
    return spec.model_copy(update={"layout": "prompt"})


def _questions(asked: Mapping[str, Asked]) -> list[Question]:
    return [question for part in asked.values() for _, questions in part for question in questions]


def _show(plan: Distillation, screen: Screen) -> None:
    """What will be asked, how long that takes at the rate limit, and what it may cost."""
    spec, sizes = plan.recipe.task.teacher, {name: len(part) for name, part in plan.asked.items()}
    screen.line(", ".join(f"{count:,} {name}" for name, count in sizes.items()) + " inputs")
    at = f" at {spec.by}" if plan.endpoint else " on this machine"
    screen.stage("Teacher", f"{spec.model or spec.by}{at}")
    stored = len({question.id for question in _questions(plan.asked)}) - plan.requests
    kept = f"; {stored:,} answers are here already" if stored else ""
    screen.line(f"{plan.requests:,} requests of about {plan.prompt_tokens:,.0f} prompt tokens{kept}")
    whose = " (counted with the student's tokenizer)" if plan.endpoint else ""
    total = plan.requests * plan.prompt_tokens
    screen.line(f"{total:,.0f} prompt tokens{whose}, answers of at most {_most(plan)} tokens")
    if plan.costs_money:
        screen.line(bill(plan))
    if plan.endpoint and plan.endpoint.key and not plan.endpoint.is_local and spec.by.startswith("http://"):
        screen.warn("the key travels unencrypted: the address begins with http://")
    if spec.requests_per_minute and plan.endpoint:
        minutes = plan.requests / spec.requests_per_minute
        screen.line(f"at least {minutes:,.1f} minutes at {spec.requests_per_minute:g} requests a minute")


def bill(plan: Distillation) -> str:
    """What the requests may cost, in words."""
    price = plan.recipe.task.teacher.price
    if not price:
        return "cost: unknown; task.teacher.price: [prompt, answer] per million tokens would tell it"
    low = plan.requests * plan.prompt_tokens * price[0] / 1e6
    high = low + plan.requests * _most(plan) * price[1] / 1e6
    return f"cost: {low:,.2f} for the prompts, at most {high:,.2f} with the answers, at the prices given"


def _most(plan: Distillation) -> int:
    return _questions(plan.asked)[0].max_new_tokens


def _collected(plan: Distillation, screen: Screen) -> dict[str, Reply]:
    """Every reply, from the folder or asked now."""
    spec, path = plan.recipe.task.teacher, plan.folder / "answers.jsonl"

    def here(questions: Sequence[Question], keep: Any) -> None:
        ask_model(load(spec.by, World()), questions, keep, plan.recipe.evaluate.batch)

    ask = partial(answer_all, plan.endpoint, say=screen.line) if plan.endpoint else here
    try:
        return collect(_questions(plan.asked), path, ask, screen)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _write(plan: Distillation, replies: Mapping[str, Reply], screen: Screen) -> dict[str, Any]:
    """Files for `run` and the ledger; returns what results.json says of the collection. Raises DataError."""
    ledger: list[LedgerEntry] = list(plan.ledger)
    dropped, used = Counter[str](), []
    for name, part in plan.asked.items():
        lines = []
        for row, questions in part:
            given = [replies[question.id] for question in questions]
            used += given
            reason, detail = _why_not(plan, name, row, given)
            if reason:
                ledger.append(LedgerEntry(source=row.source, id=row.id, action="dropped", reason=reason, detail=detail))
                dropped[reason] += 1
            else:
                lines.append(_line(plan, name, row, questions[0], given[0]))
        if not lines:
            told = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
            fix = f"Look at the answers in {plan.folder / 'answers.jsonl'} and mend the prompt or the checks."
            raise DataError(f"no answer for {name} may be imitated: {told}", where="task.teacher", fix=fix)
        write_jsonl(plan.folder / f"{name}.jsonl", lines)
    write_jsonl(plan.folder / "ledger.jsonl", ledger)
    inputs = sum(len(part) for part in plan.asked.values())
    told = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    screen.line(
        f"{inputs - sum(dropped.values()):,} of {inputs:,} answers kept" + (f"; left out: {told}" if told else "")
    )
    spec = plan.recipe.task.teacher
    known = any(row.completion for row, _ in plan.asked["test"])
    return {
        "teacher": spec.by,
        "model": spec.model,
        "inputs": inputs,
        "answers": len(used),
        "dropped": dict(dropped),
        "judged_by": "references" if known else "the teacher's answers",
        "spent": spent(used, spec.price),
    }


def _why_not(plan: Distillation, name: str, row: Conversation, given: Sequence[Reply]) -> tuple[str, str]:
    """Why a row is left out: its answer cannot be learned from, or, of a held-out row, not be a reference.

    A test row with a reference stays whatever the teacher said: it is judged too.
    """
    if name == "test" and row.completion:
        return "", ""
    reason = why_not(row, given, plan.checks, plan.vocabulary)
    if any(reason) or name == "train":
        return reason
    try:
        graded_questions([answered(row, given[0].text.strip())], plan.recipe.task)
    except DataError as error:
        return "task.also cannot grade it", error.what
    return "", ""


def _line(plan: Distillation, name: str, row: Conversation, question: Question, reply: Reply) -> dict[str, Any]:
    """One row for `run`; of a test row the reference, if there is one, and what the teacher's answer took."""
    text = reply.text.strip()
    extra = {key: value for key, value in row.extra.items() if key != PROMPT_ONLY}
    plain = len(row.prompt) == 1 and row.prompt[0].role == "user"
    prompt = row.prompt[0].content if plain else [as_dict(message) for message in row.prompt]
    line = {**extra, "prompt": prompt, "completion": answered(row, text).completion}
    if name != "test":
        return line
    size = reply.completion_tokens or len(plan.vocabulary.tokenizer.encode(text))
    teacher = {
        "answer": text,
        "prompt_tokens": count_prompt(question.messages, plan.vocabulary),
        "completion_tokens": size,
        "seconds": reply.seconds,
    }
    return {**line, "completion": text if is_prompt_only(row) else row.completion or text, "teacher": teacher}


def _student(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of the student's run: the same, on the files that were written."""
    files = {name: str(folder / f"{name}.jsonl") for name in SPLITS}
    data = {**files, "layout": "prompt_completion", "columns": {}, "rows": None}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
