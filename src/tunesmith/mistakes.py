"""What is wrong with a recipe, in words: the place, the key, the reason, and what to write there instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import date

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .errors import RecipeError

# What other programs for fine-tuning call a key.
NAMES_ELSEWHERE = {
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


def explain(error: ValidationError, where: str, places: Mapping[str, str], meanings: Mapping[str, str]) -> RecipeError:
    """Every mistake, in the order of the text. `meanings` says what each known key is for."""
    order = ["", *places]
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
        elsewhere = [name for name, others in NAMES_ELSEWHERE.items() if leaf in others.split()]
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
