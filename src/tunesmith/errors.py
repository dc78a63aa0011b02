"""What can go wrong, as the user meets it.

    TunesmithError                exit code 2, no traceback unless --debug
    ├── RecipeError               a key, value or file named in the recipe
    ├── DataError                 a row: always file, line and what to change
    ├── ModelError                a base model or adapter that cannot be used
    ├── TrainingError             training cannot go on (no trained token, NaN, out of memory)
    │   └── Interrupted           it was asked to stop, and did (exit code 130)
    └── FolderError               the run folder: locked, full, damaged, of another recipe

Every message has three parts: what happened, where (file, line, key), and what to do next.
"""

from __future__ import annotations


class TunesmithError(Exception):
    """A problem that the user can act on. `where` is a file:line or a recipe key, `fix` the next step."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__("\n".join(part for part in (f"{where}: {what}" if where else what, fix) if part))


class RecipeError(TunesmithError):
    """The recipe asks for something unknown, impossible or absent."""


class DataError(TunesmithError):
    """A data file or row cannot be used."""


class ModelError(TunesmithError):
    """A model, tokenizer, template or adapter cannot be used."""


class TrainingError(TunesmithError):
    """Training stopped, and the last good checkpoint is kept."""


class Interrupted(TrainingError):
    """Stopped by a signal after a step whose checkpoint is on the disk."""


class FolderError(TunesmithError):
    """The run folder cannot be read or written."""
