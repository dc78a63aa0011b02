"""Before the first step: values derived from model and data, each with its reason, and a prediction to be held to.

The rules follow published evidence (Schulman et al. 2025, LoRA Without Regret; Tinker's width rule) and our own sweeps
in docs/log.md. The prediction comes from a dry run of the heaviest and of typical micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.counts import counts
from ..errors import TrainingError
from ..memory import available_bytes
from ..model.linear import AMX, Linear, Precision, met_as
from ..model.load import Model
from ..model.lora import block_of
from ..model.stored import FLOAT32
from ..recipe import Method, Recipe, Update
from ..tensors import Batch, Loss, StepSource
from ..types import Derived, Example
from .checkpoint import trainable
from .dry_run import dry_run, look_at, resting_bytes
from .meter import release_memory
from .optim import state_bytes

RESERVED = 0.9  # share of the memory that a run may plan with
SAFE = 0.7  # of the micro-batch that would just fit
RATES: dict[Method, float] = {"sft": 1.0, "reward": 0.3, "dpo": 0.05, "ppo": 0.4, "grpo": 0.2}  # docs/log.md
BUSY_TOKENS, BUSY_GPU_TOKENS = 2048, 16_384
MOVED_BYTES_PER_SECOND = {"cpu": 15e9, "cuda": 2e12}  # by the optimizer
GPU_SLACK = 1.15  # full fine-tuning of 8 B weights took 1.12 times what `_step_bytes` says
HEAP_SLACK = 1.4  # of what a step takes: freed blocks of unequal streams leave holes (docs/log.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Resolved values of one update. `derived` lists them with reasons, as shown and saved."""

    update: Update
    epochs: float
    batch: int
    learning_rate: float
    rank: int
    microbatch_tokens: int
    recompute: bool
    precision: Precision
    derived: tuple[Derived, ...]
    lowest: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a training run should take. `remembered`: as an equal one was timed before. `crowded`: see DryRun."""

    seconds: float
    peak_memory_bytes: float
    flops: float
    remembered: bool = False
    crowded: bool = False

    @property
    def source(self) -> str:
        """What a sentence about it ends with, where the numbers are not of now, or not of this program alone."""
        if self.crowded:
            return ", timed while other programs ran: less without them"
        return ", as timed before" if self.remembered else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far a run's tokens go: the share that the head predicts from, and through frozen lower blocks (economy).

    `rows` rows of `row_tokens` tokens go through those once; further passes over them begin above. `forwards` is how
    often a row went through a whole model without gradients for each of its passes in training: to be drawn, and to be
    scored by the reference or a reward model.
    """

    scored: float = 1.0
    rows: float = math.inf
    row_tokens: float = 0.0
    forwards: float = 0.0


EVERYWHERE = Reach()


class _Settling:
    """Values as they are settled, each with where it came from."""

    def __init__(self, model: Model) -> None:
        self.notes: list[Derived] = [] if model.weights is FLOAT32 else [model.weights]

    def __call__(self, key: str, given: float | int | None, value: float | int, reason: str) -> float | int:
        """What the recipe gives, else `value`."""
        settled = value if given is None else given
        self.notes.append(Derived(key=key, value=settled, reason=reason if given is None else "from the recipe"))
        return settled


def derive(
    recipe: Recipe, update: Update, model: Model, examples: Sequence[Example], *, rows: int | None = None
) -> Settings:
    """Fill in what the recipe leaves open, from the data's size and the model's shape.

    `rows` is what a batch counts where that is not Examples: pairs.
    """
    settle = _Settling(model)
    rows = rows or len(examples)
    spec = recipe.train
    counted = counts(examples)
    few = "fewer rows bear more passes" if recipe.method == "sft" else "a second pass learns choices by rote"
    epochs = settle("train.epochs", spec.epochs, _epochs(rows, recipe.method), f"{rows} training rows; {few}")
    batch = settle(
        "train.batch",
        spec.batch,
        _batch(rows, epochs),
        "small enough for 100 steps or more, 32 at most (LoRA loses with large batches)",
    )
    rate = _rate(recipe, update, model, settle)
    trained, longest = int(counted.trained.sum()), int(counted.tokens.max())
    rank = lowest = 0
    if update == "economy":
        lowest = _lowest(model, recipe.lora.upper, settle)
    if update != "full":
        per_rank = _adapter_parameters_per_rank(model, lowest)
        rank = int(
            settle(
                "lora.rank",
                recipe.lora.rank,
                _rank(trained if recipe.method == "sft" else rows, per_rank),
                f"adapter weights ({per_rank:,} per rank) hold the {trained:,} trained tokens"
                if recipe.method == "sft"
                else f"{rows:,} choices say about a bit each",
            )
        )
    longest *= 2 if recipe.method in ("reward", "dpo") else 1
    adapter = 0 if update == "full" else rank * _adapter_parameters_per_rank(model, lowest)
    micro = _micro(model, adapter, longest, spec.microbatch_tokens, settle)
    precision = _precision(recipe, update, model, settle)
    recompute = _recompute(model, adapter, int(min(micro, counted.tokens.sum())), settle)
    return Settings(
        update=update,
        epochs=float(epochs),
        batch=int(batch),
        learning_rate=float(rate),
        rank=rank,
        microbatch_tokens=int(micro),
        recompute=recompute,
        precision=precision,
        derived=tuple(settle.notes),
        lowest=lowest,
    )


def derive_policy(recipe: Recipe, update: Update, model: Model, answers: int, longest_tokens: int) -> Settings:
    """The same for rollouts of `answers` answers, the longest with its prompt of `longest_tokens`."""
    settle = _Settling(model)
    spec, policy = recipe.train, recipe.policy
    ppo = recipe.method == "ppo"
    why = "passes over each rollout (ppo)" if ppo else "one pass over each rollout keeps learning on the policy (grpo)"
    epochs = settle("policy.epochs", policy.epochs, 4 if ppo else 1, why)
    batch = settle("train.batch", spec.batch, answers, "a whole rollout a step")
    rate = _rate(recipe, update, model, settle)
    rank = 0
    if update == "lora":
        rank = int(settle("lora.rank", recipe.lora.rank, 16, "a score says about a bit"))
    adapter = rank * _adapter_parameters_per_rank(model, 0)
    micro = _micro(model, adapter, longest_tokens, spec.microbatch_tokens, settle)
    recompute = _recompute(model, adapter, int(micro), settle)
    return Settings(
        update=update,
        epochs=float(epochs),
        batch=int(batch),
        learning_rate=float(rate),
        rank=rank,
        microbatch_tokens=int(micro),
        recompute=recompute,
        precision="float32",
        derived=tuple(settle.notes),
    )


def usual_rate(method: Method, update: Update, width: int) -> float:
    """The learning rate of a method unless the recipe gives one, for a model of hidden size `width`."""
    value = RATES[method] * 5e-4 * (2000 / width) ** 0.78 * {"lora": 1, "full": 0.1, "economy": 2}[update]
    return float(f"{value:.1e}")


def _rate(recipe: Recipe, update: Update, model: Model, settle: _Settling) -> float | int:
    width = int(model.head_weight.shape[1])
    given = recipe.lora.learning_rate if update != "full" and recipe.lora.learning_rate else recipe.train.learning_rate
    share = RATES[recipe.method]
    why = f"5e-4 x (2000 / {width})^0.78 for LoRA, a tenth for full, twice for economy"
    why += f"; x {share:g} for {recipe.method}" if share != 1 else ""
    return settle(f"{update}.learning_rate", given, usual_rate(recipe.method, update, width), why)


def _micro(model: Model, adapter_parameters: int, longest: int, given: int | None, settle: _Settling) -> float | int:
    """Tokens of a micro-batch: enough to keep the processor busy, a GPU as far as its memory goes; the longest row."""
    busy, why = BUSY_TOKENS, f"{BUSY_TOKENS:,} keep the processor busy"
    if model.device.type == "cuda":
        busy, why = BUSY_GPU_TOKENS, f"up to {BUSY_GPU_TOKENS:,} keep a GPU busy, as far as its memory goes"
        room = _room_bytes(model, adapter_parameters)
        while busy > BUSY_TOKENS and _slack(model) * _step_bytes(model, busy, not adapter_parameters) > room:
            busy //= 2
    why += f"; the longest row has {longest:,} tokens"
    return settle("train.microbatch_tokens", given, max(busy, longest), why)


def _room_bytes(model: Model, adapter_parameters: int) -> float:
    """What a micro-batch may take beside the weights, their gradients and the optimizer. Without adapter: in full."""
    weights = list(model.hf.parameters()) if not adapter_parameters else []
    states = 16 * adapter_parameters + sum(state_bytes(p) + p.numel() * p.element_size() for p in weights)
    return _planned_bytes(model) - resting_bytes(model) - states


def _planned_bytes(model: Model) -> float:
    """The memory that one process may plan with."""
    return RESERVED * available_bytes(model.device) / model.sharing


def _recompute(model: Model, adapter_parameters: int, tokens: int, settle: _Settling) -> bool:
    """Whether a micro-batch fits only if blocks are computed again for their gradients. Without adapter: in full."""
    if not (model.blocks and model.blocks.trains):
        return False
    room = _room_bytes(model, adapter_parameters)
    need = _slack(model) * _step_bytes(model, tokens, not adapter_parameters)
    if need <= room:
        return False
    why = f"{tokens:,} tokens would take {need / 1e9:.1f} GB beside the weights, which leave {max(room, 0) / 1e9:.1f}"
    settle("recompute", None, 1, f"{why}; a block's numbers are computed again for its gradients, exactly")
    return True


def _precision(recipe: Recipe, update: Update, model: Model, settle: _Settling) -> Precision:
    """That of training's products on a CPU.

    Methods that compare what two models say of a token stay exact, and so does full fine-tuning, whose small steps
    rounding would blur (docs/speed.md).
    """
    wanted, rounds = recipe.lora.precision, update != "full" and recipe.method in ("sft", "reward")
    if model.device.type != "cpu" or not rounds or (wanted == "float32" and not AMX):
        return "float32"
    if wanted == "float32":
        why = "exact; bfloat16 rounds what is multiplied and would take about two thirds of the time on this processor"
    elif AMX:
        why = "from the recipe; only while training, answers and scores are of float32"
    else:
        wanted, why = "float32", "this processor does not multiply bfloat16 (AMX)"
    settle.notes.append(Derived(key="lora.precision", value=wanted, reason=why))
    return wanted


def _slack(model: Model) -> float:
    return GPU_SLACK if model.device.type == "cuda" else HEAP_SLACK


def _step_bytes(model: Model, tokens: int, head_trained: bool) -> int:
    """What a pass over a stream of so many tokens takes at its peak, gradients of weights left out; 0 if not known."""
    if not model.blocks:
        return 0
    widened = 0 if model.head_weight.dtype == met_as(model.head_weight) else 4 * model.head_weight.numel()
    head = model.head_weight
    kept = tokens * len(head) * head.element_size() if head_trained and head.is_cuda else 0  # score.py keeps them
    return model.blocks.step_bytes(tokens) + widened + kept


def predict(
    model: Model,
    source: StepSource,
    loss: Loss,
    settings: Settings,
    reach: Reach = EVERYWHERE,
) -> Prediction:
    """Seconds and memory from a dry run. Where the states of frozen blocks are kept, that pass counts once a row.

    Raises TrainingError when the predicted peak does not fit, with the micro-batch that would.
    """
    parameters, sizes = trainable(model.hf), source.row_tokens()
    heaviest, shapes = look_at(source)
    release_memory()  # what preparing the rows left
    resting = resting_bytes(model)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    states = sum(state_bytes(parameter) for parameter in parameters.values())
    fixed, longest = float(resting + weights + states), math.ceil(max(sizes))
    expected = _step_bytes(model, len(heaviest.tokens), model.head_weight.requires_grad)
    _refuse_too_big(float(expected), fixed, heaviest, longest, model)
    examples = source.steps * source.rows_a_step
    spared = max(examples - reach.rows, 0) * reach.row_tokens / (examples * float(np.mean(sizes)))
    dry = dry_run(model, source, loss, heaviest, shapes, spared, settings.precision)
    moving = _slack(model) * max(dry.peak_bytes - weights, 0)
    _refuse_too_big(moving, fixed, heaviest, longest, model)
    trained = sum(parameter.numel() for parameter in parameters.values())
    optimizer_seconds = 28 * trained / MOVED_BYTES_PER_SECOND[model.device.type]
    return Prediction(
        seconds=source.steps * (dry.step_seconds + optimizer_seconds),
        peak_memory_bytes=float(moving + fixed),
        flops=flops(model, settings.update, sizes, examples, reach),
        remembered=dry.remembered,
        crowded=dry.crowded,
    )


def _refuse_too_big(moving: float, fixed: float, heaviest: Batch, longest: int, model: Model) -> None:
    """Raise TrainingError when `moving` bytes, which grow with the micro-batch, and `fixed` ones do not fit.

    Fixed are the process, the gradients and AdamW's two moments.
    """
    available, room = available_bytes(model.device), _planned_bytes(model) - fixed
    if moving <= room:
        return
    fits = int(SAFE * len(heaviest.tokens) * max(room, 0.0) / max(moving, 1.0))
    smaller = f"Set train.microbatch_tokens to {fits}, or choose" if fits >= longest else "Choose"
    who, fewer = (f"each of {model.sharing} processes", " Or start fewer.") if model.sharing > 1 else ("training", "")
    raise TrainingError(
        f"{who} needs about {(moving + fixed) / 1e9:.1f} GB, the machine has {available / 1e9:.1f} GB",
        where="train.microbatch_tokens",
        fix=f"{smaller} update: lora, shorter rows (data.max_tokens) or a smaller base.{fewer}",
    )


def flops(model: Model, update: Update, sizes: Sequence[float], examples: float, reach: Reach = EVERYWHERE) -> float:
    """Useful training FLOPs per weight and token: 6 for full tuning, 4 under adapters (frozen weights get no gradient).

    Frozen blocks below all adapters need 2, once a row where their states are kept; the head, its 6 or 4 where scored;
    a row that is drawn, or scored by a reference or a reward model, 2 each time.
    """
    tokens = float(np.mean(sizes)) * examples
    below = tokens - max(examples - reach.rows, 0) * reach.row_tokens
    head, lower = model.head_weight.numel(), model.lower_parameters
    upper = (model.product_parameters - head - lower) * tokens + head * tokens * reach.scored
    beside = 2 * (upper + lower * tokens) * reach.forwards
    return (6 if update == "full" else 4) * upper + 2 * lower * below + beside


def _lowest(model: Model, upper: float, settle: _Settling) -> int:
    """The first block that gets adapters when a share `upper` of them does."""
    blocks = 1 + max(block_of(name) or 0 for name, _ in model.hf.named_modules())
    lowest = blocks - max(1, round(upper * blocks))
    settle("lora.lowest", None, lowest, f"adapters in the upper {blocks - lowest} of {blocks} blocks (lora.upper)")
    return lowest


def _epochs(rows: int, method: Method) -> float:
    if method != "sft":
        return 1.0
    return 3.0 if rows < 2000 else 2.0 if rows < 10_000 else 1.0


def _batch(rows: int, epochs: float) -> int:
    """The largest power of two up to 32 that leaves at least 100 steps; 4 at least."""
    wanted = rows * epochs / 100
    return int(2 ** min(5, max(2, math.floor(math.log2(max(wanted, 1))))))


def _rank(trained_tokens: int, per_rank: int) -> int:
    """The smallest power of two from 16 to 256 whose adapter has as many weights as there are trained tokens."""
    rank = 16
    while rank < 256 and rank * per_rank < trained_tokens:
        rank *= 2
    return rank


def _adapter_parameters_per_rank(model: Model, lowest: int) -> int:
    return sum(
        m.in_features + m.out_features
        for name, m in model.hf.named_modules()
        if isinstance(m, Linear) and m is not model.head and (block_of(name) or 0) >= lowest
    )
