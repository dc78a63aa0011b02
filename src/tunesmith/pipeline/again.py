"""A finished run, used again: answer or judge other rows, compare it with another run, talk to it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..data.curate import curate
from ..data.read import read
from ..data.render import prompt_tokens
from ..data.split import Splits, Unit, asked_key, question_key
from ..errors import FolderError, RecipeError
from ..evaluate.measure import measure, scored
from ..evaluate.metrics import find_metric
from ..evaluate.preferences import right
from ..evaluate.stats import contrast, estimate, one_each
from ..evaluate.systems import Prompting
from ..folder import RunFolder, is_run_folder, read_json, read_jsonl, sha256_file, write_json
from ..model.load import Model, Vocabulary, load
from ..model.sample import Sampling, sample
from ..recipe import DataSpec, Recipe, load_recipe
from ..screen import Screen
from ..types import UNENDED, Comparison, Conversation, Item, Message, Row
from ..world import World
from .aligned import compared, itself, reference_of
from .handed import made_by, open_made
from .pairs import comparisons
from .panel import at_temperature, look, open_panel
from .prepare import fingerprints, questions
from .prompts import each_once, longest_prompt, question
from .reward import agreement_with
from .rows import conversations

CHAT_TOKENS = 256  # of an answer


def open_model(name: str, world: World, update: str = "") -> Model:
    """The tuned model of a run folder (its subject unless `update` says which), or any base model."""
    path = Path(name)
    if not is_run_folder(path):
        return load(name, world)
    if update == "base":
        recipe = load_recipe(path / "recipe.yaml")
        return load(recipe.base, world, recipe.weights)
    return open_made(made_by(path, update), world)


def evaluate_again(run_folder: Path, data: str, update: str, screen: Screen) -> dict[str, Any]:
    """Grade a run's model on other rows by what its verdict was made of: a metric, choices, or win rate by a judge.

    Asking any of the run's own test rows again counts as one more read.
    """
    if not is_run_folder(run_folder):
        raise FolderError(
            "not a run folder", where=str(run_folder), fix="Give the folder that `tunesmith run` printed."
        )
    folder = RunFolder(path=run_folder)
    recipe, plan = load_recipe(folder.recipe), read_json(folder.plan)
    if recipe.method == "reward":
        if update:
            raise RecipeError("a reward run has one update", where="--update", fix="Leave it out.")
        return _judged_again(folder, recipe, data, screen)
    if not {"root", "max_new_tokens"} <= set(plan):
        fix = "Delete the run folder, or set another `out`, and run the recipe again."
        raise FolderError("does not say how answers were made", where=str(folder.plan), fix=fix)
    if recipe.method != "sft":
        return _compared_again(folder, recipe, data, update, screen)
    names = [recipe.task.metric, *recipe.task.also]
    grades = {name: find_metric(name, recipe.task, Path(plan["root"])) for name in names}
    rows, left_out = _read(data, recipe, plan, screen)
    asked = questions(conversations(rows), recipe.task)
    model = open_model(str(run_folder), World(), update)
    how = Sampling(max_new_tokens=plan["max_new_tokens"], batch=recipe.evaluate.batch)
    _warn_of_long(asked, how.max_new_tokens, model.vocabulary, screen)
    with screen.progress("answering", len(asked)) as tick:
        found = measure(model, Prompting(name="tuned"), asked, grades, how, progress=tick)
    _count_read(folder, set(found.ids))
    level, seed = recipe.evaluate.level, recipe.evaluate.seed
    return {
        "data": data,
        "rows": len(asked),
        "left_out": left_out,
        "metrics": {name: asdict(estimate(scores, level, seed)) for name, scores in found.scores.items()},
    }


def _judged_again(folder: RunFolder, recipe: Recipe, data: str, screen: Screen) -> dict[str, Any]:
    """How often a run's reward models agree with other people's choices."""
    kept, left_out = _read(data, recipe, read_json(folder.plan), screen)
    rows = comparisons(kept)
    found = agreement_with(rows, folder, recipe, World(), screen)
    _count_read(folder, {row.id for row in rows})
    return {"data": data, "rows": len(rows), "left_out": left_out, **found}


def _compared_again(folder: RunFolder, recipe: Recipe, data: str, update: str, screen: Screen) -> dict[str, Any]:
    """A policy's answers to other prompts beside those of the model it began as, by the judge of the run's verdict."""
    made, plan = made_by(folder.path, update), read_json(folder.plan)
    root, room, world = Path(plan["root"]), plan["max_new_tokens"], World()
    now = fingerprints(recipe, root)
    for key in [key for key in now if key.startswith("reward") and plan.get("files", {}).get(key) != now[key]]:
        screen.warn(f"the file of {key} has changed since the run: these scores are not those of its verdict")
    rows, left_out = _read(data, recipe, plan, screen)
    unit = read_json(folder.results)["data"].get("split_by", "prompt")
    items = each_once(tuple(map(question, rows)), unit, "rows", screen)
    model = open_made(made, world)
    longest_prompt(items, rows, room, model.vocabulary)
    reference, how = reference_of(model, made.update, recipe.base, world), at_temperature(recipe, room)
    with ExitStack() as stack:
        panel = open_panel(recipe, root, model, world, stack, screen)
        with reference() as base:
            before = look(base, itself(base), panel, items, how)
        after = look(model, reference, panel, items, how)
    _count_read(folder, {asked_key(item.prompt) for item in items}, _prompt_of)
    if not panel.decides:
        screen.warn("nothing judges the answers, as in the run itself: set reward: to a reward run")
    found = compared(recipe, panel, before, after, made.update)
    return {"data": data, "rows": len(items), "left_out": left_out, **found}


def compare_runs(first: Path, second: Path) -> list[list[str]]:
    """Paired differences of two runs' models over the test rows that both answered or judged, as table rows.

    Intervals are of the higher `evaluate.level` of the two.
    """
    a, b = _answers(first), _answers(second)
    level = max(load_recipe(run / "recipe.yaml").evaluate.level for run in (first, second))
    shared = [name for name in a if name in b]
    if not shared:
        raise FolderError(
            "the two runs share no test row", where=f"{first}, {second}", fix="Give both the same test file."
        )
    rows = []
    metrics = [metric for metric in a[shared[0]] if metric in b[shared[0]] and metric != UNENDED]
    if not metrics:
        raise FolderError("the two runs share no metric", where=f"{first}, {second}", fix="Add one to task.also.")
    for metric in metrics:
        one, two = (
            scored("tuned", shared, {metric: np.array([scores[name][metric] for name in shared])}) for scores in (a, b)
        )
        found = contrast(one, two, metric, level)
        d = found.difference
        values = [f"{arm.scores[metric].mean():.4f}" for arm in (one, two)]
        change = f"{d.value:+.4f} ({100 * d.level:g}%: {d.low:+.4f} to {d.high:+.4f}, n = {d.n})"
        rows.append([metric, *values, change, f"{found.p_value:.2g}"])
    return rows


def chat_with(name: str, console: Console) -> None:
    """Questions and answers in the terminal, with everything said so far as context."""
    model = open_model(name, World())
    turns: list[Message] = []
    while question := _asked(console):
        turns.append(Message(role="user", content=question))
        prompt = np.array(prompt_tokens(turns, model.tokenizer))
        if len(prompt) + CHAT_TOKENS > model.vocabulary.context_tokens:
            console.print("[dim]this is longer than the model's context: it knows no more of what was said before[/]")
            turns = turns[-1:]
            prompt = np.array(prompt_tokens(turns, model.tokenizer))
        (answer,) = sample(model, [prompt], Sampling(max_new_tokens=CHAT_TOKENS))
        console.print(answer.text, markup=False, highlight=False)
        turns.append(Message(role="assistant", content=answer.text))


def _asked(console: Console) -> str:
    """What the user types; nothing at the end of the input."""
    try:
        return console.input("[bold cyan]you[/] ").strip()
    except EOFError:
        return ""


def _read(
    data: str, recipe: Recipe, plan: Mapping[str, Any], screen: Screen
) -> tuple[Sequence[Conversation | Comparison], dict[str, int]]:
    """All rows of a file that are worth asking, as a run would read them, and how many were left out for what."""
    spec = DataSpec(train=data, layout=recipe.data.layout, columns=recipe.data.columns)
    kept, ledger = curate(Splits(train=(), valid=(), test=tuple(read(data, spec))), spec)
    left_out = dict(Counter(entry.reason for entry in ledger if entry.action == "dropped"))
    for reason, count in left_out.items():
        screen.warn(f"{count} rows are left out: {reason}")
    _warn_of_known(data, kept.test, recipe, plan.get("files", {}).get("data.train"), screen)
    return kept.test, left_out


def _warn_of_known(data: str, rows: Sequence[Row], recipe: Recipe, trained: str | None, screen: Screen) -> None:
    """Say so where rows come from the file that the run was trained on, or ask what it asks; `trained` is its hash."""
    own = Path(recipe.data.train)
    if trained and Path(data).is_file() and sha256_file(Path(data)) == trained:
        screen.warn("this is the file that the run was trained on: scores of its rows say nothing of new ones")
    elif trained and own.is_file() and sha256_file(own) == trained:
        known = {question_key(row) for row in read(str(own), recipe.data)}
        if shared := sum(question_key(row) in known for row in rows):
            held_out = "those that the run did not hold out were trained on, and say nothing of new rows"
            screen.warn(f"{shared} of {len(rows)} rows ask what rows of {own} ask: {held_out}")


def _warn_of_long(items: Sequence[Item], room: int, vocabulary: Vocabulary, screen: Screen) -> None:
    """Say so where a prompt and its answer may go beyond what the model was made for, which shows in no other way."""
    most = vocabulary.context_tokens - room
    prompts = (prompt_tokens(item.prompt, vocabulary.tokenizer, item.tools) for item in items if item.prompt)
    if long := sum(len(prompt) > most for prompt in prompts):
        what = f"{long} of {len(items)} prompts leave no room for {room} tokens of answer in the model's context"
        screen.warn(f"{what} of {vocabulary.context_tokens:,}: answers may be worse for it")


def _prompt_of(line: Mapping[str, Any]) -> str:
    return asked_key(tuple(Message(role=turn["role"], content=turn["content"]) for turn in line["prompt"]))


def _count_read(folder: RunFolder, asked: set[str], of: Callable[[Mapping[str, Any]], str] = itemgetter("id")) -> None:
    """One more read of the test rows if any is among those asked; `of` is what an answer's line is known by."""
    if folder.results.is_file():
        results = read_json(folder.results)
        if asked & set(map(of, read_jsonl(folder.answers(results["subject"])))):
            write_json(folder.results, {**results, "test_reads": results["test_reads"] + 1})


def _answers(run_folder: Path) -> dict[str, dict[str, float]]:
    folder = RunFolder(path=run_folder)
    if not folder.results.is_file():
        raise FolderError("the run has no results.json", where=str(run_folder), fix="Finish it with `tunesmith run`.")
    results = read_json(folder.results)
    lines = read_jsonl(folder.answers(results["subject"]))
    if results.get("method") == "reward":
        return _rightly_chosen(lines, results["data"]["split_by"])
    return {line["id"]: line["scores"] for line in lines}


def _rightly_chosen(lines: Sequence[Mapping[str, Any]], unit: Unit) -> dict[str, dict[str, float]]:
    """A reward model's accuracy by observation, as its run has it: each run's scores have a scale of their own."""
    scores = np.array([[line["scores"][side] for side in ("chosen", "rejected")] for line in lines])
    asked = [_prompt_of(line) or line["id"] for line in lines]
    if unit != "prompt":
        pairs = [sorted((line["chosen"], line["rejected"])) for line in lines]
        asked = [json.dumps([prompt, *pair]) for prompt, pair in zip(asked, pairs, strict=True)]
    means = one_each(right(scores), asked)
    return {name: {"pair_accuracy": float(mean)} for name, mean in zip(dict.fromkeys(asked), means, strict=True)}
