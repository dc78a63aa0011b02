"""Which pair a rater sees next, and on which side each answer stands: functions of names, pairs and choices alone.

Nothing about showings is stored, so a closed tab or a killed server loses nothing: what has no choice comes again.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from ..data.chance import uniform
from .choices import Choice, Pair, Side

REPEATS = 0.1
FARTHEST_REPEAT = 20  # showings between a pair and its repeat, where there are enough of them


def tidy_name(name: str) -> str:
    """A rater's name without stray spaces; two spellings of one Unicode text are one name. Raises ValueError."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if not name or not name.isprintable():
        raise ValueError("a name has at least one letter and no control characters")
    return name


RaterName = Annotated[str, Field(max_length=60), AfterValidator(tidy_name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Showing:
    """A pair on the screen: `left` is the answer on the left, `repeat` whether it was judged before."""

    pair: str
    left: Side
    repeat: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How the work is divided: a share of `repeats`, and after how many raters a pair is done (0: everybody's)."""

    repeats: float = REPEATS
    per_pair: int = 0


EVERYTHING = Sharing()  # to everybody


def left_side(rater: str, pair: str, *, repeat: bool) -> Side:
    """Which answer stands on the left: a coin toss for each rater and pair; a repeat has the sides swapped."""
    return "a" if (uniform(f"side:{rater}:{pair}", 0) < 0.5) != repeat else "b"


def showings(
    rater: str, pairs: Mapping[str, Pair], choices: Collection[Choice], sharing: Sharing = EVERYTHING
) -> list[Showing]:
    """Everything this rater is to see, in order. `choices` are the standing ones of all raters.

    All raters see pairs in one order, so that they overlap however far each gets. Where pairs are divided among raters,
    each has an order of their own, so that they seldom meet on one pair.
    """
    own = {choice.pair: choice for choice in choices if choice.rater == rater and not choice.repeat}
    others: dict[str, int] = {}
    for choice in choices:
        if choice.rater != rater and not choice.repeat and choice.pick != "skip":
            others[choice.pair] = others.get(choice.pair, 0) + 1
    seed = f"order:{rater}" if sharing.per_pair else "order"
    order = sorted(
        (name for name in pairs if name in own or not sharing.per_pair or others.get(name, 0) < sharing.per_pair),
        key=lambda name: uniform(f"{seed}:{name}", 0),
    )
    gap = min(FARTHEST_REPEAT, len(order) // 2)
    early = [name for name in order[: len(order) - gap] if not pairs[name].gold]
    early.sort(key=lambda name: uniform(f"repeat:{rater}:{name}", 0))
    repeated = set(early[: round(sharing.repeats * len(order))])
    places = [(float(place), name, False) for place, name in enumerate(order)]
    places += [(place + gap + 0.5, name, True) for place, name, _ in places if _repeats(name, repeated, own)]
    return [
        Showing(pair=name, left=left_side(rater, name, repeat=repeat), repeat=repeat)
        for _, name, repeat in sorted(places)
    ]


def _repeats(name: str, repeated: Collection[str], own: Mapping[str, Choice]) -> bool:
    """A pair that was skipped has no first judgement to compare with."""
    return name in repeated and (name not in own or own[name].pick != "skip")


def waiting(rater: str, plan: Collection[Showing], choices: Collection[Choice]) -> list[Showing]:
    """The showings of `plan` that the rater has not answered, in order."""
    done = {(choice.pair, choice.repeat) for choice in choices if choice.rater == rater}
    return [showing for showing in plan if (showing.pair, showing.repeat) not in done]
