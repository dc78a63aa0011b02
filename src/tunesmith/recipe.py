"""The recipe: what to tune, on which rows, judged how. Unknown keys are errors that name the nearest key.

Small specs. A `None` means "derive it from the model and the data", and stays null in the run folder's `recipe.yaml`:
what `train/plan.py` derives is printed with its reason and saved in `plan.json`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .mistakes import explain
from .written import written

Layout = Literal[
    "auto", "prompt_completion", "messages", "instruction", "text", "preference", "openai_preference", "prompt"
]
Method = Literal["sft", "reward", "dpo", "ppo", "grpo"]
Update = Literal["lora", "full", "economy"]
Weights = Literal["auto", "float32", "stored"]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
# A path, where `~` is the user's home as it is in a shell, or another name.
PathName = Annotated[str, AfterValidator(os.path.expanduser)]
Price = Annotated[float, Field(ge=0.0)]


class Spec(BaseModel):
    """A frozen group of recipe keys; a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSpec(Spec):
    """Where rows come from and which of them are kept."""

    train: PathName = Field(
        min_length=1, description="a file (.jsonl .json .csv .parquet, also .gz), a hub id, or builtin:NAME"
    )
    valid: Fraction | PathName = Field(default=0.1, description="a fraction of train, or a file")
    test: Fraction | PathName = Field(default=0.1, description="a fraction of train, or a file")
    layout: Layout = Field(default="auto", description="how columns form a row; found from their names unless given")
    columns: dict[str, str] = Field(default_factory=dict, description="our name: your column, e.g. prompt: question")
    rows: int | None = Field(
        default=None, gt=0, description="use at most this many rows of train, drawn by seed; of a hub set the first"
    )
    max_tokens: int | None = Field(
        default=None, gt=1, description="longest example in tokens; the model's context unless given"
    )
    overlong: Literal["error", "drop"] = Field(default="error", description="what to do with rows over max_tokens")
    conflicts: Literal["drop", "flag", "keep"] = Field(
        default="drop",
        description="same prompt, different completions: keep the first; flag the others; or keep all unflagged, as "
        "fits writing, where what may not leak is then the completion",
    )
    near_duplicates: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.9, description="Jaccard similarity of word 3-grams over which two rows count as one; 1 turns it off"
    )
    rehearse: float = Field(
        default=0.5, ge=0, description="sft: weight of repeating what the base writes by itself, against forgetting"
    )
    seed: int = Field(default=0, description="changes which rows are drawn, and into which split they fall")


class TeacherSpec(Spec):
    """Who answers the inputs of `tunesmith distill` (docs/distill.md); a single name is short for `by`."""

    by: PathName = Field(default="", description="a base or finished run, or an OpenAI-compatible URL ending in /v1")
    model: str = Field(default="", description="the teacher's name at that URL")
    shots: str | None = Field(default=None, description="a file of examples for the teacher to see, beside the recipe")
    agreement: int = Field(default=1, ge=1, le=32, description="answers drawn per input, kept where all agree")
    temperature: float | None = Field(
        default=None, ge=0, description="of the teacher's answers; 0, or 0.7 where several must agree"
    )
    check_references: bool = Field(
        default=True, description="drop training answers that task.metric finds wrong, where the row has a reference"
    )
    key_env: str = Field(default="OPENAI_API_KEY", description="the environment variable that holds the key")
    requests_per_minute: float | None = Field(default=None, gt=0, description="no more requests than this")
    parallel: int = Field(default=4, ge=1, le=256, description="requests under way at once")
    price: tuple[Price, Price] | None = Field(default=None, description="of a million tokens: prompt, answer")


class TaskSpec(Spec):
    """What is asked of the model and how an answer is graded."""

    instructions: str = Field(
        default="", description="what a person would tell the base model; the tuned model does without it"
    )
    shots: int = Field(
        default=5, ge=0, le=32, description="most examples the few-shot baseline may show (chosen on valid)"
    )
    metric: str = Field(default="exact_match", description="the metric that decides: a name or file.py:function")
    also: list[str] = Field(default_factory=list, description="further metrics to report")
    pattern: str | None = Field(default=None, description="regular expression for metric regex")
    choices: list[str] | None = Field(
        default=None, min_length=2, description="closed list of answers, for choice_accuracy"
    )
    max_new_tokens: int | None = Field(
        default=None, gt=0, description="longest answer in tokens; from the data unless given"
    )
    teacher: TeacherSpec = TeacherSpec()

    @field_validator("teacher", mode="before")
    @classmethod
    def _named_or_spelled_out(cls, value: Any) -> Any:
        return {"by": value} if isinstance(value, str) else value


class TrainSpec(Spec):
    """How long and how fast to train. Everything left out is derived and printed."""

    epochs: float | None = Field(default=None, gt=0, description="passes over the training rows")
    learning_rate: float | None = Field(default=None, gt=0, lt=1, description="peak learning rate of every update")
    batch: int | None = Field(default=None, gt=0, description="examples per optimizer step")
    microbatch_tokens: int | None = Field(default=None, gt=0, description="tokens in one forward pass")
    warmup: Fraction = Field(default=0.05, description="fraction of steps with rising learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the learning rate falls after warmup: linear, cosine or constant"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's pull of weights towards 0")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    evaluations: int = Field(default=4, ge=1, description="how often to look at the validation rows")
    patience: int = Field(default=3, ge=1, description="stop after this many evaluations without improvement")
    max_steps: int | None = Field(default=None, gt=0, description="stop after this many optimizer steps")
    seed: int = Field(default=0, description="of the order of rows, of what is drawn, and of where adapters begin")


class LoraSpec(Spec):
    """Low-rank adaptation of all linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int | None = Field(
        default=None, gt=0, le=1024, description="width of the adapter; from trained tokens unless given"
    )
    alpha: float = Field(default=32.0, gt=0, description="scale: the update is alpha / rank * B A x")
    learning_rate: float | None = Field(
        default=None, gt=0, lt=1, description="overrides train.learning_rate for lora and economy"
    )
    target: list[str] | None = Field(
        default=None,
        description="names of linear layers, the output layer excepted; all unless given",
    )
    weights: Weights = Field(
        default="auto",
        description="how the frozen base is kept in memory: as stored takes half where that is bfloat16, with the same "
        "results, a quarter where `tunesmith round` made it, and is slower; auto where float32 would take over half of "
        "the memory",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="sft, reward: bfloat16 rounds what is multiplied in training, faster on a processor with AMX; a "
        "GPU does so anyway",
    )
    upper: float = Field(
        default=0.33, gt=0, le=1, description="economy: share of the blocks, from the last, that are adapted"
    )


class PreferenceSpec(Spec):
    """Learning from choices: reward models (method: reward) and dpo."""

    halves: bool = Field(
        default=True, description="reward: train a second model on the other half of the pairs, to judge the policy"
    )
    margin: str | None = Field(
        default=None, description="reward: the column that says how much better the chosen answer is"
    )
    margin_scale: float = Field(default=1.0, ge=0, description="reward: what the column's numbers are multiplied by")
    beta: float = Field(default=0.1, gt=0, description="dpo: how dearly leaving the base model is paid")
    loss: Literal["sigmoid", "ipo"] = Field(default="sigmoid", description="dpo: sigmoid or ipo; see docs/rlhf.md")
    smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="dpo: share of choices taken to be wrong")


class RewardSpec(Spec):
    """What scores the policy's answers in ppo and grpo; a single name is short for `by`."""

    by: PathName = Field(default="", description="the run folder of a reward model, or file.py:function")
    judge: PathName = Field(
        default="", description="a reward run that judges and never trains; the second half of `by` unless given"
    )
    missing_end: float = Field(default=-1.0, description="score of an answer that never ended or could not be scored")
    seconds: float = Field(default=5.0, gt=0, description="longest time that file.py:function may take for an answer")

    @property
    def by_function(self) -> bool:
        """Whether file.py:function scores, and no model."""
        return ".py:" in self.by


class PolicySpec(Spec):
    """How a policy learns from rewards (ppo, grpo). Sources of the values: docs/rlhf.md."""

    rollouts: int = Field(default=40, gt=0, description="how often answers are drawn and learned from")
    prompts: int | None = Field(default=None, gt=0, description="prompts a rollout; 64, or 16 with groups of 8")
    group: int = Field(default=8, gt=1, description="grpo: answers drawn for each prompt")
    epochs: int | None = Field(default=None, gt=0, description="passes over each rollout; 4 for ppo, 1 for grpo")
    temperature: float = Field(default=1.0, gt=0, description="of the answers that are judged; training draws at 1")
    kl: float | None = Field(default=None, ge=0, description="price of a nat from the base; 0.05 for ppo, 0 for grpo")
    kl_target: float | None = Field(default=None, gt=0, description="ppo: adapt the price to be this many nats away")
    kl_limit: float = Field(default=30.0, gt=0, description="nats from the base to stop at; no look beyond is chosen")
    value_start: Literal["zero", "reward"] = Field(default="zero", description="ppo: where the value head begins")
    advantage: Literal["grpo", "rloo"] = Field(
        default="grpo", description="grpo: an answer against the mean of its group (grpo) or of the others in it (rloo)"
    )
    mix: float = Field(default=0.0, ge=0, description="ppo: weight of imitating the answers of data.train beside it")


class EvaluateSpec(Spec):
    """What is measured before and after, and how surely."""

    rows: int | None = Field(default=None, gt=0, description="use at most this many test rows")
    valid_rows: int = Field(
        default=128, gt=0, description="validation rows looked at during training and prompt selection"
    )
    level: float = Field(default=0.95, gt=0.5, lt=1, description="confidence level of every interval")
    seed: int = Field(default=0, description="of bootstraps, permutations and drawn few-shot examples")
    batch: int = Field(default=64, gt=0, description="answers generated at once")
    forgetting: bool = Field(default=True, description="measure general ability before and after")
    retention: PathName | None = Field(
        default=None, description="a multiple-choice file (prompt, choices, answer) for forgetting"
    )
    forgetting_limit: float = Field(
        default=0.2, gt=0, description="largest acceptable rise of general loss, nats per token"
    )
    margin: float = Field(
        default=0.05,
        gt=0,
        description="how much less than its teacher's a student's score may be and still count as equal",
    )


class Recipe(Spec):
    """One run: base model, data, task, method."""

    base: PathName = Field(
        default="smollm2-135m-instruct",
        min_length=1,
        description="a built-in name, a hub id, a folder, or a .gguf file",
    )
    data: DataSpec
    task: TaskSpec = TaskSpec()
    method: Method = Field(
        default="sft", description="sft from answers; reward and dpo from choices; ppo and grpo from a reward"
    )
    update: list[Update] = Field(
        default_factory=lambda: ["lora"], description="lora, full, economy, or several to compare them"
    )
    train: TrainSpec = TrainSpec()
    lora: LoraSpec = LoraSpec()
    preference: PreferenceSpec = PreferenceSpec()
    reward: RewardSpec = RewardSpec()
    policy: PolicySpec = PolicySpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    out: PathName | None = Field(default=None, description="run folder; runs/<recipe name> unless given")

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, value: Any, handler: Callable[[Any], Any], info: Any) -> Any:
        """A wrong recipe is told alike in Python and in a file: as a RecipeError."""
        try:
            return handler(value)
        except ValidationError as error:
            about = info.context or {}
            raise explain(error, about.get("where", "recipe"), about.get("places", {}), _meanings()) from None

    @property
    def weights(self) -> Weights:
        """How the base is kept in memory; full fine-tuning moves every weight, in float32."""
        return "float32" if "full" in self.update else self.lora.weights

    @field_validator("reward", mode="before")
    @classmethod
    def _named_or_spelled_out(cls, value: Any) -> Any:
        return {"by": value} if isinstance(value, str) else value

    @field_validator("update", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("update")
    @classmethod
    def _each_once(cls, value: list[Update]) -> list[Update]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name lora, full, economy, or several of them once each")
        return value


def load_recipe(path: Path | str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` overrides.

    Raises RecipeError that names file, line and key of every mistake, and the nearest known key for an unknown one.
    """
    path = Path(path)
    found = written(path, overrides)
    recipe = parse_recipe(found.values, str(path), found.places)
    return recipe.model_copy(update={"out": recipe.out or f"runs/{path.stem}"})


def parse_recipe(raw: dict[str, Any], where: str = "recipe", places: Mapping[str, str] | None = None) -> Recipe:
    """Validate a mapping; `places` says by dotted key where each of its keys stands, in the order of the text.

    Raises RecipeError with place, key and reason of every mistake, and the nearest known key for an unknown one.
    """
    return Recipe.model_validate(raw, context={"where": where, "places": places or {}})


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text, every key present."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_keys() -> list[str]:
    """Every dotted key of the recipe."""
    return list(_meanings())


def described_keys(spec: type[BaseModel] = Recipe, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every dotted key that takes a value, with its default as YAML writes it and what it means."""
    rows: list[tuple[str, str, str]] = []
    for name, info in spec.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Spec):
            rows += described_keys(info.annotation, f"{prefix}{name}.")
            continue
        default = "" if info.is_required() else info.get_default(call_default_factory=True)
        shown = "" if default in (None, "") else yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
        rows.append((prefix + name, shown, info.description or ""))
    return rows


def _meanings(spec: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, str]:
    """What each key's description says, by dotted key; empty where there is none."""
    found: dict[str, str] = {}
    for name, info in spec.model_fields.items():
        found[prefix + name] = info.description or ""
        if isinstance(info.annotation, type) and issubclass(info.annotation, Spec):
            found |= _meanings(info.annotation, prefix + name + ".")
    return found
