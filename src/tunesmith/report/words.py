"""Numbers and names as a reader sees them: one place, so that page, charts and terminal say the same."""

from __future__ import annotations

from typing import Any

from ..evaluate.metrics import TEXT_METRICS
from ..types import Estimate
from .record import RunRecord, is_number

ABSENT = "–"
MINUS, NO_BREAK = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
# Metrics between 0 and 1: shown as percentages, their differences as points.
SHARES = frozenset(
    {
        *TEXT_METRICS,
        "choice_accuracy",
        "pair_accuracy",
        "general_accuracy",
        "win_rate",
        "repetition",
        "unended",
        "unscored",
    }
)
METHODS = {"sft": "SFT", "reward": "reward model", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
_METRICS = {
    "pair_accuracy": "pair accuracy",
    "judge_score": "judge score",
    "reward_score": "reward score",
    "length_tokens": "answer tokens",
    "unended": "cut off",
    "unscored": "no score",
    "win_rate": "win rate",
    "general_loss": "general loss",
    "general_accuracy": "general accuracy",
    "kl_from_base": "KL from the base per token",
}
_LABELS = {
    "base": "base model",
    "instructed": "instructed",
    "few_shot": "few-shot",
    "nearest_neighbour": "nearest neighbour",
    "majority": "majority answer",
    "teacher": "teacher with its prompt",
    "lora": "LoRA",
    "full": "full fine-tuning",
    "economy": "economy (upper layers)",
    "reward": "reward model",
    "length": "longer answer",
    "untrained": "untrained head",
}


def arm_label(run: RunRecord, arm: str) -> str:
    """An arm's name for readers; the few-shot arm says how many examples it shows."""
    shots = (run.results.get("few_shot") or {}).get("k") if arm == "few_shot" else None
    if is_number(shots):
        return f"few-shot ({shots} example{'' if shots == 1 else 's'})"
    return _LABELS.get(arm, arm.replace("_", " "))


def metric_label(metric: str) -> str:
    """A metric's name for readers: our own ones in words, a user's as it was given."""
    return _METRICS.get(metric, metric)


def metric_text(metric: str, value: Any) -> str:
    """`71.0%` for shares, `31.5` for tokens, else three decimals."""
    if not is_number(value):
        return ABSENT
    return signed(f"{100 * value:.1f}%" if metric in SHARES else f"{value:,.{_decimals(metric)}f}")


def difference_text(metric: str, value: Any, *, unit: bool = True) -> str:
    """`+50.0 points` for shares, else a signed number."""
    if not is_number(value):
        return ABSENT
    if metric in SHARES:
        return signed(f"{100 * value:+.1f}") + (" points" if unit else "")
    return signed(f"{value:+,.{_decimals(metric)}f}")


def interval_text(metric: str, estimate: Estimate, *, difference: bool = False) -> str:
    """`68.0 to 74.0`: the bounds alone, in the unit of the value beside them."""
    if difference:
        return " to ".join(difference_text(metric, bound, unit=False) for bound in (estimate.low, estimate.high))
    return " to ".join(metric_text(metric, bound).rstrip("%") for bound in (estimate.low, estimate.high))


def percent(fraction: Any, decimals: int = 0) -> str:
    """A fraction as a percentage."""
    return signed(f"{100 * fraction:.{decimals}f}%") if is_number(fraction) else ABSENT


def level_text(level: float) -> str:
    """`97.5%`: an interval's level with all its digits, or 99.9 % would be certain."""
    return f"{100 * level:g}%"


def count(value: Any) -> str:
    """`1,030`; a fractional count keeps one decimal."""
    if not is_number(value):
        return ABSENT
    return signed(f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.1f}")


def rounded_count(value: Any) -> str:
    """A count of which two figures matter: `41,000`, `2.1 million`, `1.3 billion`."""
    if not is_number(value):
        return ABSENT
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.1f} {name}"
    digits = max(len(str(int(value))) - 2, 0)
    return f"{round(value, -digits):,.0f}"


def seconds(value: Any) -> str:
    """`0.4 s`, `41 s`, `5 min 0 s`, `21 min`, `2 h 5 min`."""
    if not is_number(value):
        return ABSENT
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def size(value: Any) -> str:
    """Bytes in decimal units: `2.10 GB`."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def flops(value: Any) -> str:
    """Floating-point operations in decimal units: `51.0 TFLOP`."""
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"))


def p_value(value: Any) -> str:
    """`< 0.001` or `0.032`, never broken over two lines."""
    if not is_number(value):
        return ABSENT
    return f"<{NO_BREAK}0.001" if value < 0.001 else f"{value:.3f}"


def p_text(value: Any) -> str:
    """`p < 0.001` or `p = 0.032`."""
    shown = p_value(value)
    return NO_BREAK.join(["p", shown] if shown.startswith("<") else ["p", "=", shown])


def plain(value: Any) -> str:
    """A recipe value: numbers short, the rest as text."""
    if isinstance(value, bool) or not is_number(value):
        return ABSENT if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def signed(text: str) -> str:
    """The same number with a real minus sign, and no minus before a zero."""
    if text.startswith("-") and not any(digit in text for digit in "123456789"):
        text = text[1:]
    return text.replace("-", MINUS)


def _decimals(metric: str) -> int:
    return 1 if metric.endswith("_tokens") else 3


def _scaled(value: Any, units: tuple[str, ...]) -> str:
    if not is_number(value):
        return ABSENT
    scale = 0
    while abs(value) >= 999.5 and scale < len(units) - 1:
        value, scale = value / 1000, scale + 1
    return f"{value:.3g} {units[scale]}" if scale else f"{value:,.0f} {units[0]}"
