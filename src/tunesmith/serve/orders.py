"""A fine-tuning job as clients ask for it, and the recipe that it becomes.

Fields have the names of OpenAI's API. `tunesmith` is ours: what our recipes have and that API has not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from ..data.layout import is_prompt_only
from ..data.read import read
from ..errors import DataError
from ..evaluate.graders import GRADE, filled
from ..evaluate.metrics import TEXT_METRICS
from ..recipe import DataSpec, PolicySpec, Recipe, parse_recipe
from ..recipe import Method as Way
from ..train.plan import usual_rate
from ..types import Comparison
from .bodies import Body, Name
from .graders import GRADER_FILE, Grader, allow, places_of
from .problems import Problem

TEST = 0.1
ROLLOUT_PROMPTS = 16  # of reinforcement's batches, unless asked otherwise
WAYS: Mapping[str, Way] = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
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


class ReinforcementHyperparameters(Hyperparameters):
    """Of `reinforcement`: a batch is prompts of one rollout, the compute multiplier scales answers to each."""

    compute_multiplier: Auto | Annotated[float, Field(gt=0, le=16)] = "auto"
    eval_interval: Auto = "auto"
    eval_samples: Auto = "auto"
    reasoning_effort: Literal["default"] = "default"


class Supervised(Body):
    """Imitate the answers."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Body):
    """Learn from choices between two answers."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Reinforcement(Body):
    """Learn from a grader's scores of the model's own answers."""

    grader: Grader
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class Method(Body):
    """How to learn. The one that `type` names may be spelled out; reinforcement must be, for its grader."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None

    @model_validator(mode="after")
    def _only_its_own(self) -> Method:
        spelled_out = {"supervised": self.supervised, "dpo": self.dpo, "reinforcement": self.reinforcement}
        if any(said and name != self.type for name, said in spelled_out.items()):
            raise ValueError(f"the type is {self.type}, but another method is spelled out")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("reinforcement needs a grader")
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


def order(body: JobBody, *, python_graders: bool = False) -> dict[str, Any]:
    """The request in one form, whichever of the two places its hyperparameters were in. Raises Problem."""
    method = body.method or Method(type="supervised")
    spelled_out = method.reinforcement or method.dpo or method.supervised
    if spelled_out and body.hyperparameters:
        raise Problem(400, "give method or hyperparameters, not both", param="hyperparameters")
    given = spelled_out.hyperparameters if spelled_out else body.hyperparameters or Hyperparameters()
    if method.type == "dpo" and not spelled_out:
        given = DpoHyperparameters(**given.model_dump())
    how: dict[str, Any] = {"hyperparameters": given.model_dump()}
    if method.reinforcement:
        how["grader"] = method.reinforcement.grader.model_dump(exclude_none=True)
        allow(how["grader"], python=python_graders)
    if body.training_file == body.validation_file:
        raise Problem(400, "the validation file is the training file", param="validation_file")
    extras = body.tunesmith.model_dump(exclude_none=True) if body.tunesmith else {}
    if method.type != "supervised" and (vain := sorted({"instructions", "metric", "shots"} & extras.keys())):
        raise Problem(400, f"tunesmith.{vain[0]}: says nothing to method {method.type}", param="tunesmith")
    return {
        "model": body.model,
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "method": {"type": method.type, method.type: how},
        "suffix": body.suffix,
        "seed": body.seed or 0,
        "metadata": body.metadata,
        "tunesmith": extras,
    }


def hyperparameters(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of an `order`."""
    method = asked["method"]
    return method[method["type"]]["hyperparameters"]


def grader_of(asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The grader of an `order` for reinforcement."""
    return asked["method"].get("reinforcement", {}).get("grader")


def recipe_of(
    asked: Mapping[str, Any], base: str, width: int, training: Path, validation: Path | None, out: Path
) -> Recipe:
    """The recipe of an `order` for a base model of hidden size `width`. Raises RecipeError."""
    extras, wishes = asked["tunesmith"], {k: v for k, v in hyperparameters(asked).items() if v != "auto"}
    method = WAYS[asked["method"]["type"]]
    train: dict[str, Any] = {"seed": asked["seed"], "max_steps": extras.get("max_steps")}
    more: dict[str, Any] = {"preference": {"beta": wishes["beta"]}} if "beta" in wishes else {}
    if times := wishes.get("learning_rate_multiplier"):
        train["learning_rate"] = times * usual_rate(method, "lora", width)
    if method == "grpo":
        more = {"reward": f"{GRADER_FILE}:{GRADE}", "policy": _policy(wishes, train.pop("max_steps"), training)}
    else:
        train |= {"epochs": wishes.get("n_epochs"), "batch": wishes.get("batch_size")}
    task = {key: extras[key] for key in ("instructions", "metric", "shots", "max_new_tokens") if key in extras}
    data = {**_layout(asked), "train": str(training), "test": extras.get("test", TEST)}
    return parse_recipe(
        {
            "base": base,
            "data": {**data, **({"valid": str(validation)} if validation else {})},
            "task": task,
            "method": method,
            "update": ["lora"],
            "train": train,
            "lora": {"rank": extras.get("rank")},
            **more,
            "evaluate": {"forgetting": extras["forgetting"]} if "forgetting" in extras else {},
            "out": str(out),
        },
        where="the job",
    )


def check_rows(path: Path, asked: Mapping[str, Any]) -> int:
    """How many rows a file has. Raises DataError naming file and line where one is not for the order's method."""
    method, grader = asked["method"]["type"], grader_of(asked)
    rows = 0
    for row in read(str(path), DataSpec(train=str(path), **_layout(asked))):
        rows += 1
        kind = "dpo" if isinstance(row, Comparison) else "reinforcement" if is_prompt_only(row) else "supervised"
        if kind != method:
            raise DataError(f"not a row for method {method}", where=row.source, fix=f"Write {_ROWS[method]}.")
        for name in places_of(grader) if grader else ():
            try:
                filled(f"{{{{ {name} }}}}", "", row.extra)
            except DataError as error:
                raise DataError(error.what, where=row.source, fix=error.fix) from None
    return rows


_ROWS = {
    "supervised": '{"messages": [...]} with the assistant last',
    "dpo": '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}',
    "reinforcement": '{"messages": [...]} with the user last, and beside it the fields that the grader reads',
}


def _layout(asked: Mapping[str, Any]) -> dict[str, Any]:
    """How the rows are read; prompts with a grader's fields beside them look like nothing that says so."""
    prompts = asked["method"]["type"] == "reinforcement"
    return {"layout": "prompt", "columns": {"prompt": "messages"}} if prompts else {}


def _policy(wishes: Mapping[str, Any], most: int | None, training: Path) -> dict[str, Any]:
    """Rollouts that ask every prompt `n_epochs` times, counted as the file has them, at most `most`."""
    prompts = wishes.get("batch_size", ROLLOUT_PROMPTS)
    rollouts = PolicySpec().rollouts
    if "n_epochs" in wishes:
        with training.open("rb") as file:
            rows = sum(1 for line in file if line.strip())
        rollouts = max(1, math.ceil(wishes["n_epochs"] * rows / prompts))
    group = max(2, round(PolicySpec().group * wishes.get("compute_multiplier", 1)))
    return {"prompts": prompts, "rollouts": min(rollouts, most or rollouts), "group": group}
