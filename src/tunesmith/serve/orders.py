"""A fine-tuning job as clients ask for it, and the recipe that it becomes.

Fields have the names of OpenAI's API. `tunesmith` is ours: what our recipes have and that API has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from ..data.layout import is_prompt_only
from ..data.read import read
from ..errors import DataError
from ..evaluate.metrics import TEXT_METRICS
from ..recipe import DataSpec, Recipe, parse_recipe
from ..train.plan import usual_rate
from ..types import Comparison
from .bodies import Body, Name
from .problems import Problem

TEST = 0.1
METRICS = (*(name for name in TEXT_METRICS if name != "regex"), "completion_loss")  # those that need no further key
Auto = Literal["auto"]
FileName = Annotated[str, StringConstraints(pattern=r"^file-[A-Za-z0-9]{1,64}$")]
Suffix = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Key = Annotated[str, StringConstraints(max_length=64)]
Value = Annotated[str, StringConstraints(max_length=512)]


class Hyperparameters(Body):
    """Of `supervised`; `auto` is what `tunesmith run` derives from data and model."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class DpoHyperparameters(Hyperparameters):
    """Of `dpo`."""

    beta: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class Supervised(Body):
    """Imitate the answers."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Body):
    """Learn from choices between two answers."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(Body):
    """How to learn. The one that `type` names may be spelled out."""

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        if value == "reinforcement":
            raise ValueError("reinforcement is not done here; `tunesmith run` has grpo and ppo. Use supervised or dpo")
        return value

    @model_validator(mode="after")
    def _only_its_own(self) -> Method:
        if (self.supervised and self.type != "supervised") or (self.dpo and self.type != "dpo"):
            raise ValueError(f"the type is {self.type}, but another method is spelled out")
        return self


class Extras(Body):
    """What our recipes have besides: the task, held-out rows, the adapter's size."""

    instructions: Annotated[str, StringConstraints(max_length=65536)] | None = None
    metric: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")] | None = None
    shots: Annotated[int, Field(ge=0, le=32)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=65536)] | None = None
    test: Annotated[float, Field(gt=0, lt=1)] | None = None
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_steps: Annotated[int, Field(ge=1)] | None = None
    forgetting: bool | None = None

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in METRICS:
            raise ValueError(f"unknown; one of {', '.join(METRICS)}")
        return value


class JobBody(Body):
    """POST /v1/fine_tuning/jobs."""

    model: Name
    training_file: FileName
    validation_file: FileName | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None  # the old place of method.supervised.hyperparameters
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    integrations: Annotated[list[object], Field(max_length=0)] | None = None
    tunesmith: Extras | None = None


def order(body: JobBody) -> dict[str, Any]:
    """The request in one form, whichever of the two places its hyperparameters were in. Raises Problem."""
    method = body.method or Method(type="supervised")
    spelled_out = method.dpo if method.type == "dpo" else method.supervised
    if spelled_out and body.hyperparameters:
        raise Problem(400, "give method or hyperparameters, not both", param="hyperparameters")
    given = spelled_out.hyperparameters if spelled_out else body.hyperparameters or Hyperparameters()
    if method.type == "dpo" and not spelled_out:
        given = DpoHyperparameters(**given.model_dump())
    if body.training_file == body.validation_file:
        raise Problem(400, "the validation file is the training file", param="validation_file")
    return {
        "model": body.model,
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "method": {"type": method.type, method.type: {"hyperparameters": given.model_dump()}},
        "suffix": body.suffix,
        "seed": body.seed or 0,
        "metadata": body.metadata,
        "tunesmith": body.tunesmith.model_dump(exclude_none=True) if body.tunesmith else {},
    }


def hyperparameters(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of an `order`."""
    method = asked["method"]
    return method[method["type"]]["hyperparameters"]


def recipe_of(
    asked: Mapping[str, Any], base: str, width: int, training: Path, validation: Path | None, out: Path
) -> Recipe:
    """The recipe of an `order` for a base model of hidden size `width`. Raises RecipeError."""
    extras, wishes = asked["tunesmith"], {k: v for k, v in hyperparameters(asked).items() if v != "auto"}
    method = "dpo" if asked["method"]["type"] == "dpo" else "sft"
    train = {"seed": asked["seed"], "epochs": wishes.get("n_epochs"), "batch": wishes.get("batch_size")}
    if times := wishes.get("learning_rate_multiplier"):
        train["learning_rate"] = times * usual_rate(method, "lora", width)
    task = {key: extras[key] for key in ("instructions", "metric", "shots", "max_new_tokens") if key in extras}
    data = {"train": str(training), "test": extras.get("test", TEST)}
    return parse_recipe(
        {
            "base": base,
            "data": {**data, **({"valid": str(validation)} if validation else {})},
            "task": task,
            "method": method,
            "update": ["lora"],
            "train": {**train, "max_steps": extras.get("max_steps")},
            "lora": {"rank": extras.get("rank")},
            "preference": {"beta": wishes["beta"]} if "beta" in wishes else {},
            "evaluate": {"forgetting": extras["forgetting"]} if "forgetting" in extras else {},
            "out": str(out),
        },
        where="the job",
    )


def check_rows(path: Path, method: str) -> int:
    """How many rows a file has. Raises DataError naming file and line where one is not for the method."""
    rows = 0
    for row in read(str(path), DataSpec(train=str(path))):
        rows += 1
        if isinstance(row, Comparison) != (method == "dpo") or is_prompt_only(row):
            wanted = (
                '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}'
                if method == "dpo"
                else '{"messages": [...]} with the assistant last'
            )
            raise DataError(f"not a row for method {method}", where=row.source, fix=f"Write {wanted}.")
    return rows
