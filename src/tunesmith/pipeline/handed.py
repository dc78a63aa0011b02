"""What training hands over, an adapter or a whole model, and opening it again."""

from __future__ import annotations

from pathlib import Path

from ..folder import RunFolder
from ..model.adapters import Beside, load_adapter, nothing, save_adapter, save_model
from ..model.load import Model, load, resolve
from ..model.lora import LoraShape
from ..model.pinned import check_base
from ..model.values import without_value_head
from ..recipe import Recipe, Update
from ..world import World


def hand_over(model: Model, shape: LoraShape | None, out: Path, beside: Beside = nothing) -> None:
    """Write the adapter of this shape, or without one the whole model; a value head stays behind."""
    with without_value_head(model):
        if shape:
            save_adapter(model, shape, out, beside)
        else:
            save_model(model, out, beside)


def open_made(folder: RunFolder, recipe: Recipe, update: Update, made: Path, world: World) -> Model:
    """The model that an update of a run made: its own, or the base with its adapter. Raises ModelError."""
    if update == "full":
        return load(str(made), world)
    base = resolve(recipe.base)
    check_base(folder, base)
    model = load(str(base), world, recipe.weights)
    load_adapter(model, made)
    return model
