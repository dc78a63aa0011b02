"""What training hands over, an adapter or a whole model: written, found again in a finished run, and opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError, RecipeError
from ..folder import RunFolder, is_run_folder, manifest_problem, read_json
from ..model.adapters import Beside, load_adapter, nothing, save_adapter, save_model
from ..model.load import Model, load, resolve
from ..model.lora import LoraShape
from ..model.pinned import check_base
from ..model.values import without_value_head
from ..recipe import Recipe, Update, load_recipe
from ..world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What an update of a run handed over, in the folder `path`: a model of its own (full) or an adapter of a base."""

    run: RunFolder
    recipe: Recipe
    update: Update
    path: Path

    @property
    def name(self) -> str:
        """What the run is called, by its folder."""
        return self.run.path.resolve().name

    @property
    def base(self) -> str:
        """The model that answers, but for the adapter."""
        return str(self.path) if self.update == "full" else self.recipe.base


def made_by(run: Path, update: str = "", *, hashes: bool = False) -> Made:
    """What a finished run made for the update, or for its subject; compared with its manifest, `hashes` too.

    Raises TunesmithError.
    """
    where = str(run)
    if not is_run_folder(run):
        raise FolderError("not a run folder", where=where, fix="Give the folder that `tunesmith run` printed.")
    folder = RunFolder(path=run)
    recipe = load_recipe(folder.recipe)
    if recipe.method == "reward":
        raise RecipeError("a reward model gives scores, not answers", where=where, fix="Name the run of a policy.")
    if not folder.results.is_file():
        raise FolderError("the run has not finished", where=where, fix="Finish it with `tunesmith run`.")
    wanted = update or read_json(folder.results)["subject"]
    if wanted not in recipe.update:
        fix = f"It has: {', '.join(recipe.update)}."
        raise RecipeError(f"the run has no update {wanted!r}", where="--update", fix=fix)
    made = folder.handed_over(wanted)
    problem = manifest_problem(made, hashes=hashes) if made.is_dir() else "it is gone"
    if problem:
        fix = "Put a copy of the folder back, or delete the run folder and run the recipe again."
        raise FolderError(f"not what the run handed over: {problem}", where=str(made), fix=fix)
    return Made(run=folder, recipe=recipe, update=wanted, path=made)


def hand_over(model: Model, shape: LoraShape | None, out: Path, beside: Beside = nothing) -> None:
    """Write the adapter of this shape, or without one the whole model; a value head stays behind."""
    with without_value_head(model):
        if shape:
            save_adapter(model, shape, out, beside)
        else:
            save_model(model, out, beside)


def open_made(made: Made, world: World) -> Model:
    """The model, with its adapter if it is one. Raises ModelError where its base is no longer the one it began with."""
    if made.update == "full":
        return load(made.base, world)
    base = resolve(made.base)
    check_base(made.run, base)
    model = load(str(base), world, made.recipe.weights)
    load_adapter(model, made.path)
    return model
