"""`tunesmith label`: people choose between two answers in a local page, and the choices become training pairs.

    tunesmith label recipe.yaml --pairs pairs.jsonl     collect
    tunesmith label recipe.yaml --summary               how far to trust it
    tunesmith label recipe.yaml --export prefs.jsonl    what `reward` and `dpo` read

Everything is in one folder, `labels/<recipe name>`; running the command again goes on with it.
"""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from ..data.layout import as_dict
from ..errors import DataError
from ..folder import RunFolder, locked, write_jsonl
from ..recipe import Recipe
from ..screen import Screen
from ..types import Estimate, Message
from .choices import Choice, Pair, add_pairs, count_equal, opened, read_choices, read_pairs
from .listen import LOOPBACK, bound
from .page import label_app
from .pairs import given_pairs
from .summary import Rater, Summary, summarise
from .turns import EVERYTHING, Sharing, tidy_name

PROMPTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where pairs come from: files, or one or two models that answer `prompts` of the recipe's training prompts."""

    pairs: str = ""
    gold: str = ""
    models: tuple[str, ...] = ()
    prompts: int | None = None


def label_folder(recipe_path: Path) -> Path:
    """Where a recipe's pairs and choices are kept unless the user says otherwise."""
    return Path("labels") / recipe_path.stem


def gather(recipe: Recipe, folder: Path, source: Source, screen: Screen) -> int:
    """Put the pairs of `source` into the folder's store, drawing answers where none are given; return how many it has.

    Without any source, a folder that has pairs keeps them; a fresh one has them drawn from the recipe's base. Raises
    TunesmithError.
    """
    if len(source.models) > 2:
        raise DataError("more than two models", where="--model", fix="Give one or two; a pair has two answers.")
    given = {name: given_pairs(name, gold=gold) for name, gold in ((source.pairs, False), (source.gold, True)) if name}
    with opened(folder, create=True) as store:
        for name, found in given.items():
            new = add_pairs(store, found.pairs)
            screen.line(f"{name}: {new} new pairs, {len(found.pairs) - new} known or repeated")
            if found.equal:
                screen.warn(f"{name}: {found.equal} rows have two equal answers and are left out")
        empty = all(pair.gold for pair in read_pairs(store).values())
        if source.models or source.prompts or (empty and not source.pairs):
            from .draw import draw_pairs

            models = source.models or (recipe.base,)
            with locked(RunFolder(path=folder)):
                draw_pairs(recipe, (models[0], models[-1]), source.prompts or PROMPTS, store, screen)
        pairs = read_pairs(store)
    if all(pair.gold for pair in pairs.values()):
        raise DataError("there is no pair to judge", where=str(folder), fix="Give --pairs, or models that differ.")
    return len(pairs)


def serve(
    folder: Path, name: str, screen: Screen, *, port: int, rater: str = "", sharing: Sharing = EVERYTHING
) -> None:
    """Serve the page on the loopback interface until interrupted. Raises TunesmithError if the port is in use."""
    try:
        rater = tidy_name(rater) if rater else ""
    except ValueError as error:
        raise DataError(str(error), where="--rater", fix="Write --rater Anna.") from None
    with opened(folder) as store, closing(bound(LOOPBACK, port)) as server_socket:
        app = label_app(store, name, rater, sharing)
        screen.line(f"http://{LOOPBACK}:{server_socket.getsockname()[1]}   (stop with Ctrl-C; every choice is kept)")
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
        with suppress(KeyboardInterrupt):  # the usual way to stop
            uvicorn.Server(config).run(sockets=[server_socket])
        screen.line(f"{len(read_choices(store))} choices in {folder}")


def export(folder: Path, target: Path, screen: Screen) -> int:
    """Write decided choices as rows of prompt, chosen and rejected, and say what was left out; return their number.

    Two raters' choices on one pair are two rows. Raises DataError, and writes nothing, where nothing was decided.
    """
    with opened(folder) as store:
        pairs, choices = read_pairs(store), read_choices(store)
    first = [choice for choice in choices if not choice.repeat and not pairs[choice.pair].gold]
    rows = [preference(pairs[choice.pair], choice) for choice in first if choice.decided]
    if not rows:
        raise DataError("no pair was decided yet", where=str(folder), fix="Choose some in the page first.")
    write_jsonl(target, rows)
    left_out = {
        "ties": sum(choice.pick == "tie" for choice in first),
        "both bad": sum(choice.pick == "both_bad" for choice in first),
        "skipped": sum(choice.pick == "skip" for choice in first),
        "gold": sum(bool(pairs[choice.pair].gold) for choice in choices),
        "repeats": sum(choice.repeat for choice in choices),
    }
    screen.line(f"{len(rows)} rows in {target}; left out: {', '.join(f'{n} {what}' for what, n in left_out.items())}")
    return len(rows)


def preference(pair: Pair, choice: Choice) -> dict[str, Any]:
    """A decided choice in the preference layout that `data.read` reads, with who, when and which models."""
    chosen, rejected = (pair.a, pair.b) if choice.verdict == "a" else (pair.b, pair.a)
    models = (pair.model_a, pair.model_b) if choice.verdict == "a" else (pair.model_b, pair.model_a)
    asks_once = len(pair.prompt) == 1 and pair.prompt[0].role == "user" and not pair.prompt[0].tool_calls
    row = {
        "prompt": pair.prompt[0].content if asks_once else [as_dict(turn) for turn in pair.prompt],
        "chosen": _answer(chosen),
        "rejected": _answer(rejected),
        "rater": choice.rater,
        "time": choice.time,
        "pair": choice.pair,
    }
    known = {"chosen_model": models[0], "rejected_model": models[1]}
    return row | {name: model for name, model in known.items() if model}


def summary(folder: Path, level: float, seed: int) -> Summary:
    """Counts and measures of all choices in the folder. Raises DataError where there is none."""
    with opened(folder) as store:
        pairs, choices, equal = read_pairs(store), read_choices(store, undone=True), count_equal(store)
    if not choices:
        raise DataError("nobody has chosen yet", where=str(folder), fix="Choose some in the page first.")
    return summarise(pairs, choices, level, seed, equal)


def show_summary(found: Summary, screen: Screen) -> None:
    """Print a summary as tables."""
    screen.line(f"{found.judged} of {found.pairs} pairs judged")
    people = [*found.raters, found.everybody] if len(found.raters) > 1 else found.raters
    headers = ["rater", "choices", "decided", "ties", "both bad", "skipped", "undone", "seconds each"]
    screen.table(headers, [_counts(rater) for rater in people])
    headers = ["rater", "chose the left", "chose the longer", "repeats alike", "gold right"]
    screen.table(headers, [_shares(rater) for rater in people])
    if found.agreement:
        screen.line(f"agreement between raters, Krippendorff's alpha: {_number(found.agreement)}")
    elif len(found.raters) > 1:
        screen.line("agreement between raters: none to measure; no pair was judged twice, or all judged alike")
    for duel in found.duels:
        tally = f"{duel.wins} wins, {duel.losses} losses, {duel.ties} ties"
        screen.line(f"{duel.a} over {duel.b}: preferred in {_share(duel.win_rate)} ({tally})")
    if found.equal:
        screen.line(f"{found.equal} prompts got two equal answers, which nobody was asked about")


def _counts(rater: Rater) -> list[str]:
    numbers = (rater.choices, rater.decided, rater.ties, rater.both_bad, rater.skipped, rater.undone)
    return [rater.name, *map(str, numbers), f"{rater.median_seconds:.1f}"]


def _shares(rater: Rater) -> list[str]:
    return [rater.name, *map(_share, (rater.left, rater.longer, rater.repeats_alike, rater.gold_right))]


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    value, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.0f}% ({low:.0f} to {high:.0f}, n = {estimate.n})"


def _number(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f}, {estimate.n} pairs)"


def _answer(message: Message) -> str | list[dict[str, Any]]:
    """Text where text is read back as it is; a list of one message where there is more, or it would look like one."""
    if message.tool_calls or message.content.lstrip().startswith('[{"'):
        return [as_dict(message)]
    return message.content
