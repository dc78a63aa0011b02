"""Tunesmith: fine-tune a language model on your own examples, and know whether it worked."""

from typing import TYPE_CHECKING, Any

from .recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from .pipeline.run import run

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "load_recipe", "run"]


def __getattr__(name: str) -> Any:
    """Import `run`, and with it torch, only when it is asked for."""
    if name == "run":
        from .pipeline.run import run

        return run
    raise AttributeError(name)
