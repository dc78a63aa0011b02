"""The recipe: what to tune, on which rows, judged how. Unknown keys are errors that name the nearest key.

Small specs. A `None` means "derive it from the model and the data", and stays null in the run folder's `recipe.yaml`:
what `train/plan.py` derives is printed with its reason and saved in `plan.json`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from .errors import RecipeError
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
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    evaluations: int = Field(default=4, ge=1, description="how often to look at the validation rows")
    patience: int = Field(default=3, ge=1, description="stop after this many evaluations without improvement")
    max_steps: int | None = Field(default=None, gt=0, description="stop after this many optimizer steps")
    seed: int = 0


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
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
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
    advantage: Literal["grpo", "rloo"] = "grpo"
    mix: float = Field(default=0.0, ge=0, description="ppo: weight of imitating the answers of data.train beside it")


class EvaluateSpec(Spec):
    """What is measured before and after, and how surely."""

    rows: int | None = Field(default=None, gt=0, description="use at most this many test rows")
    valid_rows: int = Field(
        default=128, gt=0, description="validation rows looked at during training and prompt selection"
    )
    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    seed: int = 0
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
    method: Method = "sft"
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


# What other programs for fine-tuning call a key.
_NAMES_ELSEWHERE = {
    "base": "model model_name model_name_or_path base_model pretrained_model_name_or_path",
    "data.train": "dataset datasets dataset_name train_file training_file train_dataset",
    "data.valid": "val_set_size validation_file eval_dataset test_size",
    "data.max_tokens": "max_seq_length max_seq_len max_length cutoff_len sequence_len model_max_length block_size",
    "data.rows": "max_samples max_train_samples num_samples",
    "train.epochs": "num_train_epochs num_epochs n_epochs",
    "train.learning_rate": "lr",
    "train.batch": "batch_size per_device_train_batch_size gradient_accumulation_steps micro_batch_size",
    "train.warmup": "warmup_ratio warmup_steps",
    "train.schedule": "lr_scheduler lr_scheduler_type",
    "train.clip": "max_grad_norm gradient_clipping",
    "train.evaluations": "eval_steps eval_strategy evaluation_strategy evals_per_epoch",
    "train.patience": "early_stopping_patience",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.target": "target_modules lora_target lora_target_modules",
    "lora.weights": "load_in_8bit load_in_4bit quantization quantization_bit",
    "lora.precision": "bf16 fp16 torch_dtype dtype",
    "update": "adapter peft finetuning_type tuner",
    "method": "stage trainer rl",
    "task.instructions": "system system_prompt",
    "preference.loss": "loss_type pref_loss",
    "policy.kl": "kl_coef init_kl_coef",
    "policy.group": "num_generations",
    "policy.prompts": "rollout_batch_size",
    "out": "output_dir output save_dir",
}


def load_recipe(path: Path | str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` overrides.

    Raises RecipeError that names file, line and key of every mistake, and the nearest known key for an unknown one.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError("no such recipe", where=str(path), fix="Give the path of a YAML recipe; see recipes/.")
    found = written(path, overrides)
    recipe = parse_recipe(found.values, str(path), found.places)
    return recipe.model_copy(update={"out": recipe.out or f"runs/{path.stem}"})


def parse_recipe(raw: dict[str, Any], where: str = "recipe", places: Mapping[str, str] | None = None) -> Recipe:
    """Validate a mapping; `places` says by dotted key where each of its keys stands, in the order of the text.

    Raises RecipeError with place, key and reason of every mistake, and the nearest known key for an unknown one.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, where, places or {}) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text, every key present."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_keys() -> list[str]:
    """Every dotted key of the recipe."""
    return list(_meanings())


def _meanings(spec: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, str]:
    """What each key's description says, by dotted key; empty where there is none."""
    found: dict[str, str] = {}
    for name, info in spec.model_fields.items():
        found[prefix + name] = info.description or ""
        if isinstance(info.annotation, type) and issubclass(info.annotation, Spec):
            found |= _meanings(info.annotation, prefix + name + ".")
    return found


def _explain(error: ValidationError, where: str, places: Mapping[str, str]) -> RecipeError:
    """Every mistake, in the order of the text."""
    order, meanings = ["", *places], _meanings()
    found: dict[tuple[str, str], tuple[int, RecipeError]] = {}
    for problem in error.errors():
        dotted = key = ".".join(map(str, problem["loc"]))
        if problem["type"] not in ("extra_forbidden", "missing"):
            # Inside a list or a union pydantic names places that are no keys.
            key = max((name for name in meanings if _begins(dotted, name)), key=len, default=key)
        stands = max((place for place in order if _begins(dotted, place)), key=len, default="")
        # A value that may be of two types has a problem for each of them.
        mistake = order.index(stands), _mistake(problem, key, meanings, places.get(stands, where))
        found.setdefault((key, repr(problem["input"])), mistake)
    mistakes = [str(mistake) for _, mistake in sorted(found.values(), key=lambda placed: placed[0])]
    if len(mistakes) == 1:
        return next(mistake for _, mistake in found.values())
    told = "\n".join(mistake.replace("\n", "\n    ") for mistake in mistakes)
    return RecipeError(f"{len(mistakes)} mistakes", where=where, fix=told)


def _begins(dotted: str, name: str) -> bool:
    return f"{dotted}.".startswith(f"{name}.")


def _mistake(problem: ErrorDetails, key: str, meanings: Mapping[str, str], where: str) -> RecipeError:
    if problem["type"] == "extra_forbidden":
        leaf = key.split(".")[-1]
        same_leaf = [name for name in meanings if name.split(".")[-1] == leaf]
        elsewhere = [name for name, others in _NAMES_ELSEWHERE.items() if leaf in others.split()]
        near = difflib.get_close_matches(key, meanings, n=1, cutoff=0.4)
        meant = next(iter([*same_leaf, *elsewhere, *near]), "")
        fix = f"Did you mean {meant!r}?" if meant else "See `tunesmith schema` for the known keys."
        return RecipeError(f"unknown key {key!r}", where=where, fix=fix)
    if problem["type"] == "missing":
        return RecipeError(f"the key {key!r} is missing", where=where, fix=f"Add {key}: ... to the recipe.")
    if problem["type"] == "model_type":
        what = f"{key} = {problem['input']!r}: here stand keys, not a value"
        return RecipeError(what, where=where, fix=f"Write its keys on indented lines below {key}:, or leave it out.")
    reason = problem["msg"].removeprefix("Value error, ")
    meaning = meanings.get(key)
    fix = f"Write there: {meaning}." if meaning else f"Change {key}; see `tunesmith schema`."
    if problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float | date):
        fix = "Put it in quotes: without them YAML reads yes and no as true and false, and numbers and dates as such."
    return RecipeError(f"{key} = {problem['input']!r}: {reason}", where=where, fix=fix)
