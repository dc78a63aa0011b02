"""How every run begins: is it finished, may this recipe use the folder, which base does it start from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from ..errors import FolderError, RecipeError
from ..evaluate.metrics import find_metric
from ..folder import (
    RunFolder,
    is_run_folder,
    locked,
    manifest_problem,
    only_begun,
    open_run,
    read_json,
    write_json,
    write_jsonl,
)
from ..model.load import Model, load, resolve
from ..model.pinned import base_problem, fingerprint
from ..model.stored import FLOAT32
from ..recipe import DataSpec, PolicySpec, Recipe, dump_recipe
from ..screen import Screen
from ..train.meter import machine
from ..types import Grade, LedgerEntry
from ..world import World
from .prepare import fingerprints

_SFT_ALONE = ("task.instructions", "task.shots", "data.rehearse")
_OF_ONE_MODEL = (*_SFT_ALONE, "lora.precision")
_OF_ROLLOUTS = tuple(f"policy.{key}" for key in PolicySpec.model_fields if key != "temperature")
_OF_EPOCHS = ("train.epochs", "train.max_steps")
UNREAD = {
    "sft": ("reward", "policy", "preference"),
    "reward": (*_SFT_ALONE, "reward", "policy", "preference.beta", "preference.loss", "preference.smoothing"),
    "dpo": (*_OF_ONE_MODEL, *_OF_ROLLOUTS, "preference.halves", "preference.margin", "preference.margin_scale"),
    "ppo": (*_OF_ONE_MODEL, *_OF_EPOCHS, "preference", "policy.group", "policy.advantage"),
    "grpo": (*_OF_ONE_MODEL, *_OF_EPOCHS, "preference", "policy.kl_target", "policy.value_start", "policy.mix"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run works: its recipe, folder, processes, screen, and when it began (monotonic seconds)."""

    recipe: Recipe
    folder: RunFolder
    root: Path
    world: World
    screen: Screen
    started: float


def finished(folder: RunFolder, recipe: Recipe, world: World, root: Path) -> bool:
    """Whether the folder already holds this run's results. Raises FolderError for one that is not this recipe's."""
    if not is_run_folder(folder.path):
        return False
    if world.leads:
        open_run(folder.path, dump_recipe(recipe))
        if folder.results.is_file():
            _still_whole(folder, recipe)
    world.barrier()
    if folder.plan.is_file() and not only_begun(folder):
        began, now = read_json(folder.plan).get("files", {}), fingerprints(recipe, root)
        changed = [key for key, digest in now.items() if began.get(key, digest) != digest]
        if changed:
            what = f"the file of {changed[0]} has changed since this run began"
            raise FolderError(what, where=str(folder.path), fix="Choose another `out`, or delete this folder.")
        if not folder.results.is_file() and (problem := base_problem(folder, resolve(recipe.base))):
            fix = "Put the base's former files back, choose another `out`, or delete this folder."
            raise FolderError(f"{problem} than when this run began", where=str(folder.path), fix=fix)
    return folder.results.is_file()


def _still_whole(folder: RunFolder, recipe: Recipe) -> None:
    """Raises FolderError where what a finished run handed over is no longer as it was written.

    It cannot be mended here: the weights that were judged are gone, and others would need another verdict.
    """
    models = read_json(folder.results).get("models", ())  # of a reward run
    made = [folder.path / name for name in models] or [folder.handed_over(update) for update in recipe.update]
    for path in made:
        if problem := manifest_problem(path):
            what = f"the run is finished, but {path.name}/ is not what it handed over: {problem}"
            fix = "Delete the run folder, or set another `out`, and run again; or put a copy of the folder back."
            raise FolderError(what, where=str(folder.path), fix=fix)


def needs_held_out(recipe: Recipe) -> None:
    """Raises RecipeError where there would be no validation or no test rows."""
    for name in ("valid", "test"):
        if not getattr(recipe.data, name):
            use = "prompts and weights are chosen" if name == "valid" else "the result is judged"
            raise RecipeError(f"{use} on {name} rows", where=f"data.{name}", fix="Give a fraction above 0, or a file.")


def checked(recipe: Recipe, root: Path, screen: Screen) -> dict[str, Grade]:
    """The metrics, found; keys that the method does not read are told. Raises RecipeError for what cannot be run."""
    needs_held_out(recipe)
    untouched = Recipe(data=DataSpec(train=recipe.data.train))
    for key in UNREAD[recipe.method]:
        given, default = (reduce(getattr, key.split("."), one) for one in (recipe, untouched))
        if given != default:
            screen.warn(f"{key} has no effect with method: {recipe.method}")
    named = [recipe.task.metric, *recipe.task.also] if recipe.method == "sft" else recipe.task.also
    return {name: find_metric(name, recipe.task, root) for name in named}


def one_update(recipe: Recipe) -> None:
    """Raises RecipeError where a method that trains one model, by lora or full, is asked for something else."""
    if recipe.update == ["economy"]:
        what = f"method {recipe.method} has no economy, which is for answers that are imitated (sft)"
        raise RecipeError(what, where="update", fix="Choose lora or full.")
    if len(recipe.update) > 1:
        fix = "Choose lora or full; compare two runs with `tunesmith compare`."
        raise RecipeError(f"method {recipe.method} trains one model a run", where="update", fix=fix)


def load_base(recipe: Recipe, world: World, screen: Screen) -> Model:
    """The base model, announced."""
    screen.stage("Base model", recipe.base)
    base = load(recipe.base, world, recipe.weights)
    for note in base.notes:
        screen.warn(note)
    size = f"{base.parameters / 1e6:,.0f} M parameters" if base.parameters > 1e6 else f"{base.parameters:,} parameters"
    screen.line(f"{size}, context {base.vocabulary.context_tokens:,} tokens, {world.device}")
    if base.weights is not FLOAT32:
        screen.line(f"weights in {base.weights.value}: {base.weights.reason}")
    return base


@contextmanager
def opened(place: Place, ledger: Iterable[LedgerEntry], facts: Mapping[str, Any]) -> Iterator[None]:
    """The run folder, held alone by the first rank, with ledger and plan; `facts` are further keys of the plan."""
    folder, recipe, world = place.folder, place.recipe, place.world
    if not world.leads:
        world.barrier()
        yield
        return
    open_run(folder.path, dump_recipe(recipe))
    with locked(folder):
        write_jsonl(folder.ledger, ledger)
        if only_begun(folder) or not folder.plan.is_file():
            plan = {
                "machine": machine(world.device),
                "derived": [],
                "arms": {},
                **facts,
                "root": place.root.resolve(),
                "files": fingerprints(recipe, place.root),
                "base": fingerprint(resolve(recipe.base)),
            }
        else:  # what is timed by the clock is then of this process alone
            known = read_json(folder.plan)
            plan = {**known, "resumed": known.get("resumed", 0) + 1}
        write_json(folder.plan, plan)
        world.barrier()
        yield
