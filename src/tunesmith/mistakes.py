"""What is wrong in a recipe, told with place, key and reason, and where a key of another tool's stands here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import date

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .errors import RecipeError

# Our key, then what TRL, Axolotl, LLaMA-Factory, Unsloth and OpenAI's jobs call it.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "base": ("model", "base_model", "model_name", "model_name_or_path", "model_id", "pretrained_model_name_or_path"),
    "data.train": ("dataset", "datasets", "dataset_name", "dataset_path", "data_files", "train_file", "training_file"),
    "data.valid": ("val_size", "val_set_size", "validation_file", "validation_split", "eval_dataset", "eval_file"),
    "data.test": ("test_dataset", "test_file", "test_size"),
    "data.rows": ("max_samples", "max_train_samples"),
    "data.max_tokens": ("max_seq_length", "max_seq_len", "max_length", "sequence_len", "cutoff_len", "context_length"),
    "task.instructions": ("system_prompt", "default_system", "prompt_template"),
    "task.metric": ("metrics", "metric_for_best_model"),
    "method": ("stage", "rl", "trainer", "trainer_type"),
    "update": ("finetuning_type", "adapter", "peft", "use_peft", "peft_type"),
    "out": ("output", "output_dir", "save_dir"),
    "train.epochs": ("num_train_epochs", "num_epochs", "n_epochs"),
    "train.learning_rate": ("lr", "learning_rate_multiplier"),
    "train.batch": (
        *("batch_size", "per_device_train_batch_size", "micro_batch_size", "train_batch_size"),
        *("gradient_accumulation_steps", "accumulation_steps"),
    ),
    "train.warmup": ("warmup_ratio", "warmup_steps", "num_warmup_steps"),
    "train.schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler"),
    "train.clip": ("max_grad_norm", "gradient_clipping"),
    "train.evaluations": ("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy"),
    "train.patience": ("early_stopping", "early_stopping_patience"),
    "lora.rank": ("r", "lora_r", "lora_rank"),
    "lora.alpha": ("lora_alpha",),
    "lora.target": ("target_modules", "lora_target", "lora_target_modules", "lora_target_linear"),
    "lora.weights": ("load_in_4bit", "load_in_8bit", "quantization"),
    "lora.precision": ("bf16", "fp16"),
    "preference.beta": ("dpo_beta", "pref_beta"),
    "preference.loss": ("loss_type", "pref_loss"),
    "policy.group": ("num_generations",),
    "policy.rollouts": ("num_rollouts",),
    "policy.kl": ("kl_coef", "init_kl_coef"),
    "reward.by": ("reward_model", "reward_funcs", "reward_model_path"),
}
# What is chosen by the program, always done, or never.
NOT_HERE = {
    *("tf32", "optim", "optimizer", "lora_dropout", "dropout", "bias", "train_on_inputs"),
    *("gradient_checkpointing", "packing", "sample_packing", "flash_attention", "template", "chat_template"),
    *("logging_steps", "save_steps", "save_strategy", "save_total_limit", "report_to"),
}


def explain(error: ValidationError, where: str, places: Mapping[str, str], meanings: Mapping[str, str]) -> RecipeError:
    """Every mistake, in the order of the text; `meanings` has what each known key is for."""
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
        return RecipeError(f"unknown key {key!r}", where=where, fix=_known(key, meanings))
    if problem["type"] == "missing":
        return RecipeError(f"the key {key!r} is missing", where=where, fix=f"Add {key}: ... to the recipe.")
    if problem["type"] == "model_type":
        what = f"{key} = {problem['input']!r}: here stand keys, not a value"
        fix = f"Write its keys on indented lines below {key}:, or leave it out."
        if key == "data" and isinstance(problem["input"], str):
            fix = f"Write data: {{train: {problem['input']}}}."
        return RecipeError(what, where=where, fix=fix)
    reason = problem["msg"].removeprefix("Value error, ")
    meaning = meanings.get(key)
    fix = f"Write there: {meaning}." if meaning else f"Change {key}; see `tunesmith schema`."
    if problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float | date):
        fix = "Put it in quotes: without them YAML reads yes and no as true and false, and numbers and dates as such."
    return RecipeError(f"{key} = {problem['input']!r}: {reason}", where=where, fix=fix)


def _known(key: str, meanings: Mapping[str, str]) -> str:
    """What to do about an unknown key: ours for another tool's, its right group, or the nearest."""
    leaf = key.split(".")[-1]
    for ours, theirs in ELSEWHERE.items():
        if leaf in theirs:
            return f"Here it is {ours!r}" + (f": {meanings[ours]}." if meanings[ours] else ".")
    if leaf in NOT_HERE:
        return "Leave it out: there is nothing to choose. See `tunesmith schema` for the known keys."
    near = difflib.get_close_matches(key, meanings, n=1, cutoff=0.65)
    guesses = [name for name in meanings if name.split(".")[-1] == leaf] or near
    if not guesses:
        return "See `tunesmith schema` for the known keys."
    return f"Did you mean {' or '.join(map(repr, guesses))}?"
