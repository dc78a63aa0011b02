"""What a teacher answers: every input once, kept as it comes, and which of the answers a student may imitate.

Answers stand in `answers.jsonl` of the teacher's folder under a hash of all that decides them, one flushed line each.
So a collection killed at any moment goes on without asking again, a changed prompt asks anew and loses nothing, and
answers that cost money outlive the run that used them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.layout import content_id
from ..data.read import items, read
from ..data.render import prompt_tokens, render_last
from ..errors import DataError, ModelError, RecipeError
from ..evaluate.metrics import MODEL_METRICS, READING_METRICS, find_metric, is_binary, normalised_match
from ..evaluate.systems import Prompting, takes_system
from ..folder import append_jsonl, is_run_folder, read_jsonl, sha256_file, sync
from ..model.endpoint import Question, Reply
from ..model.load import Model, Vocabulary
from ..model.sample import Sampling, sample
from ..recipe import DataSpec, Recipe
from ..screen import Screen
from ..types import Conversation, Grade, Item, Message
from .rows import conversations

AGREEING_TEMPERATURE = 0.7
MOST_ANSWER_TOKENS = 256
CHUNK = 128  # questions that a local teacher answers between two writes
TELLING_REFUSALS = 5  # so many and not one answer: it is not the inputs

Keep = Callable[[Question, Reply], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """How a training answer is checked: by its fellow samples, and by the row's reference where there is one."""

    agree: Grade
    right: Grade | None
    metric: str


def is_remote(recipe: Recipe) -> bool:
    """Whether the teacher is an address."""
    return "://" in recipe.task.teacher.by


def prompting_of(recipe: Recipe, root: Path, system: bool) -> Prompting:
    """The teacher's long prompt: task.instructions, and shots as earlier turns. Raises RecipeError, DataError."""
    shots: tuple[Conversation, ...] = ()
    if recipe.task.teacher.shots:
        source = str(root / recipe.task.teacher.shots)
        shots = tuple(conversations(list(read(source, DataSpec(train=source)))))
    instructions = recipe.task.instructions
    return Prompting(name="teacher", instructions=instructions, placement="system" if system else "user", shots=shots)


def questions_for(
    recipe: Recipe, prompting: Prompting, rows: Sequence[Conversation], samples: int
) -> list[list[Question]]:
    """What to ask about each row: `samples` questions each, all alike but for their seed."""
    spec = recipe.task.teacher
    default = AGREEING_TEMPERATURE if samples > 1 else 0.0
    temperature = default if spec.temperature is None else spec.temperature
    most = recipe.task.max_new_tokens or MOST_ANSWER_TOKENS
    who = [spec.by, spec.model, _version(spec.by)]
    asked = []
    for item in items(rows):
        messages = prompting.messages(item)
        said = [[message.role, message.content] for message in messages]
        key = [*who, said, temperature, most]
        asked.append(
            [
                Question(
                    id=content_id(*key, seed),
                    messages=messages,
                    temperature=temperature,
                    max_new_tokens=most,
                    seed=seed,
                )
                for seed in range(samples)
            ]
        )
    return asked


def read_answers(path: Path) -> dict[str, Reply]:
    """Replies by question. A last line that a crash tore is dropped. Raises FolderError for another damaged line."""
    return {line.pop("id"): Reply(**line) for line in read_jsonl(path)}


def unanswered(questions: Sequence[Question], known: Mapping[str, Reply]) -> list[Question]:
    """Questions without a reply, none twice."""
    return list({question.id: question for question in questions if question.id not in known}.values())


def collect(
    questions: Sequence[Question],
    path: Path,
    ask: Callable[[Sequence[Question], Keep], None],
    screen: Screen,
) -> dict[str, Reply]:
    """Let `ask` answer what `path` does not hold yet; each reply is on the disk before the next is taken."""
    known = read_answers(path)
    todo = unanswered(questions, known)
    if not todo:
        return known
    answered = sum(not reply.refusal for reply in known.values())
    with screen.progress("the teacher answers", len(todo)) as tick:
        done = 0

        def keep(question: Question, reply: Reply) -> None:
            nonlocal answered, done
            answered, done = answered + (not reply.refusal), done + 1
            if done >= TELLING_REFUSALS and not answered:
                fix = "Check model and temperature of task.teacher, and task.max_new_tokens, against what it takes."
                raise ModelError(f"the teacher refuses everything ({reply.refusal})", where="task.teacher", fix=fix)
            append_jsonl(path, {"id": question.id, **asdict(reply)})
            sync(path)
            known[question.id] = reply
            tick(done)

        ask(todo, keep)
    return known


def ask_model(model: Model, questions: Sequence[Question], keep: Keep, batch: int) -> None:
    """Let a model on this machine answer, `batch` questions side by side."""
    for start in range(0, len(questions), CHUNK):
        for question, reply in _sampled(model, questions[start : start + CHUNK], batch):
            keep(question, reply)


def _sampled(model: Model, questions: Sequence[Question], batch: int) -> list[tuple[Question, Reply]]:
    """A chunk of questions answered side by side, those of one temperature together."""
    found = []
    for temperature in sorted({question.temperature for question in questions}):
        some = [question for question in questions if question.temperature == temperature]
        prompts = [np.array(prompt_tokens(question.messages, model.tokenizer)) for question in some]
        most = some[0].max_new_tokens
        longest = max(len(prompt) for prompt in prompts) + most
        if longest > model.vocabulary.context_tokens:
            what = f"prompt and answer take {longest} tokens, the context holds {model.vocabulary.context_tokens}"
            raise RecipeError(what, where="task.teacher.by", fix="Shorten the prompt, or lower task.max_new_tokens.")
        # Which numbers are drawn depends on the first question of the chunk, so no two chunks draw the same.
        seed = int(some[0].id, 16) % 2**63
        how = Sampling(max_new_tokens=most, temperature=temperature, seed=seed, batch=batch)
        start = time.monotonic()
        completions = sample(model, prompts, how)
        seconds = (time.monotonic() - start) / len(some)
        for question, prompt, said in zip(some, prompts, completions, strict=True):
            reply = Reply(
                text=said.text,
                stop=said.stop,
                prompt_tokens=len(prompt),
                completion_tokens=len(said.tokens),
                seconds=seconds,
            )
            found.append((question, reply))
    return found


def why_not(row: Conversation, replies: Sequence[Reply], checks: Checks, vocabulary: Vocabulary) -> tuple[str, str]:
    """Why a student may not imitate the teacher's answer to this row, and the detail; empty where it may."""
    for reply in replies:
        if reply.refusal:
            return "the teacher refused", reply.refusal
        if reply.stop == "length":
            return "the answer did not end", f"cut at {reply.completion_tokens or '?'} tokens"
        if not reply.text.strip():
            return "empty answer", ""
    text = replies[0].text.strip()
    asked = Item(prompt=row.prompt, reference=text, id=row.id, tools=row.tools, extra=row.extra)
    if not _passes(checks.agree, asked, text):
        return f"{checks.metric} cannot read it", repr(text[:60])
    if not all(_passes(checks.agree, asked, reply.text) for reply in replies[1:]):
        return "answers disagree", " | ".join(dict.fromkeys(reply.text.strip()[:40] for reply in replies))
    if checks.right and row.completion and not _passes(checks.right, replace(asked, reference=row.completion), text):
        return f"wrong by {checks.metric}", f"{text[:60]!r}, not {row.completion[:60]!r}"
    try:
        render_last(answered(row, text), vocabulary.tokenizer, vocabulary.eos_ids)
    except DataError as error:
        return "cannot be trained", error.what
    return "", ""


def answered(row: Conversation, text: str) -> Conversation:
    """The row with the teacher's answer in the place of its own."""
    return replace(row, messages=(*row.prompt, Message(role="assistant", content=text)))


def checks_of(recipe: Recipe, root: Path) -> Checks:
    """How answers are checked: they agree by what the metric reads in them, or else by their words.

    Only metrics that say right or wrong can find an answer wrong. Raises RecipeError.
    """
    metric = recipe.task.metric
    grade = find_metric(metric, recipe.task, root)
    by_words: Grade = lambda asked, texts: [  # noqa: E731
        normalised_match(text, item.reference) for item, text in zip(asked, texts, strict=True)
    ]
    judges = recipe.task.teacher.check_references and is_binary(metric) and metric not in MODEL_METRICS
    return Checks(
        agree=grade if metric in READING_METRICS else by_words, right=grade if judges else None, metric=metric
    )


def count_prompt(messages: Sequence[Message], vocabulary: Vocabulary) -> int:
    """Prompt tokens by the student's tokenizer: one ruler for teacher and student."""
    if messages and messages[0].role == "system" and not takes_system(vocabulary.tokenizer):
        messages = [replace(messages[0], role="user"), *messages[1:]]
    return len(prompt_tokens(messages, vocabulary.tokenizer))


def spent(replies: Sequence[Reply], price: tuple[float, float] | None) -> dict[str, Any]:
    """Tokens that the teacher counted over these replies, and what they cost."""
    read_tokens = sum(reply.prompt_tokens or 0 for reply in replies)
    written_tokens = sum(reply.completion_tokens or 0 for reply in replies)
    cost = (read_tokens * price[0] + written_tokens * price[1]) / 1e6 if price else None
    return {"prompt_tokens": read_tokens, "completion_tokens": written_tokens, "cost": cost}


def _passes(grade: Grade, item: Item, text: str) -> bool:
    try:
        return grade([item], [text.strip()])[0] == 1
    except DataError:  # an answer that the metric cannot read, as a reference
        return False


def _version(teacher: str) -> str:
    """What tells a run from an earlier one of its name."""
    results = Path(teacher) / "results.json"
    return sha256_file(results) if "://" not in teacher and is_run_folder(Path(teacher)) and results.is_file() else ""
