"""Which models are served under which names: one base in memory, and any number of adapters on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError, ModelError
from ..folder import RunFolder, is_run_folder, storage_errors
from ..model.load import Model, load, resolve
from ..model.peft_layout import Adapter, read_adapter
from ..model.pinned import check_base
from ..pipeline.handed import Made, made_by
from ..world import World
from .engine import Engine, Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One name: `key` is what rows carry (empty for the base itself), `root` where the weights are."""

    name: str
    key: str
    root: str
    since: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineup:
    """What is to be served together: adapters on one base, `source` as it was named and `base` where it lies."""

    source: str
    base: Path
    name: str
    adapters: tuple[Made, ...]


class Hall:
    """The engine and the names by which its adapters are asked for. Used on the event loop, `opened` apart."""

    def __init__(self, engine: Engine, source: str, base: Path, base_name: str) -> None:
        self.engine, self.source, self.base, self.base_name = engine, source, base, base_name
        self.served: dict[str, Served] = {}
        self._coming: set[str] = set()
        self._made = 0

    @property
    def model(self) -> Model:
        """The base."""
        return self.engine.model

    def add_base(self) -> None:
        """Answer as the base too."""
        self.served[self.base_name] = Served(name=self.base_name, key="", root=str(self.base), since=int(time.time()))

    def prepared(self, path: Path, name: str, update: str = "") -> Adapter:
        """Read a run's adapter from the disk. Raises TunesmithError unless it is a finished run of this base."""
        folder = RunFolder(path=path)
        with storage_errors(path):
            has_lora = folder.adapter.is_dir() or not folder.handed_over("economy").is_dir()
        made = made_by(path, update or ("lora" if has_lora else "economy"))
        if resolve(made.base).resolve() != self.base.resolve():
            fix = f"This server holds {self.base_name}; start another for {made.base}."
            raise ModelError(f"the run is an adapter of another base, {made.base}", where=name, fix=fix)
        check_base(made.run, self.base)
        adapter = read_adapter(made.path)
        self.engine.adapters.check(adapter)
        return adapter

    async def add(self, path: Path, name: str, update: str = "") -> None:
        """Load a run's adapter, of `update` if it has several, while others are answered. Raises TunesmithError."""
        if name in self.served or name in self._coming:
            fix = "Unload it first, or choose another name."
            raise ModelError(f"a model called {name} is served already", where="lora_name", fix=fix)
        self._coming.add(name)
        try:
            adapter = await asyncio.to_thread(self.prepared, path, name, update)
            self._made += 1
            key = f"{name}#{self._made}"  # a name used again must not meet the rows of its first bearer
            await asyncio.wrap_future(self.engine.add_adapter(key, adapter))
            self.served[name] = Served(name=name, key=key, root=str(path), since=int(time.time()))
        finally:
            self._coming.discard(name)

    def remove(self, name: str) -> None:
        """No longer answer to the name; answers under way are finished. Raises ModelError where it is no adapter's."""
        served = self.served.get(name)
        if served is None or not served.key:
            raise ModelError(f"no adapter called {name} is served", where="lora_name", fix="GET /v1/models lists them.")
        del self.served[name]
        self.engine.remove_adapter(served.key)


def line_up(names: Sequence[str], update: str) -> Lineup:
    """The base that all runs share, and their adapters. `names` are run folders, or one base model alone.

    A fully tuned run is a base of its own, so it is served alone. Raises TunesmithError.
    """
    runs = [made_by(Path(name), update) for name in names if is_run_folder(Path(name))]
    plain = [name for name in names if not is_run_folder(Path(name))]
    if plain and len(names) > 1:
        fix = "Give run folders, or one base model alone; the base of adapters is served beside them."
        raise FolderError("not a run folder", where=plain[0], fix=fix)
    if len({run.name for run in runs}) < len(runs):
        raise FolderError("two runs have the same name", where=" ".join(names), fix="Rename one of the folders.")
    full = next((run for run in runs if run.update == "full"), None)
    if len(runs) > 1 and full:
        fix = "Serve it alone, or give --update lora where it has an adapter too."
        raise ModelError("a fully tuned model shares no base with others", where=str(full.run.path), fix=fix)
    source = runs[0].base if runs else plain[0]
    base = resolve(source)
    strange = [run for run in runs if resolve(run.base) != base]
    if strange:
        what = f"an adapter of {strange[0].base}, not of {source}"
        raise ModelError(what, where=str(strange[0].run.path), fix="Start a server for each base.")
    adapters = () if full else tuple(runs)
    for run in adapters:
        check_base(run.run, base)
    name = full.name if full else Path(source).absolute().name  # of "." too
    if not full and name in {run.name for run in runs}:
        raise FolderError("a run has the name of its base", where=name, fix="Rename the folder.")
    return Lineup(source=source, base=base, name=name, adapters=adapters)


def opened(lineup: Lineup, limits: Limits, world: World) -> Hall:
    """The base and its adapters, loaded. Raises TunesmithError."""
    model = _loaded(str(lineup.base), world)
    context = min(limits.context_tokens, model.vocabulary.context_tokens)
    engine = Engine(model, Limits(rows=limits.rows, waiting=limits.waiting, context_tokens=context))
    hall = Hall(engine, lineup.source, lineup.base, lineup.name)
    hall.add_base()
    for run in lineup.adapters:
        asyncio.run(hall.add(run.run.path, run.name, run.update))
    return hall


def _loaded(base: str, world: World) -> Model:
    """`load` on a thread that ends.

    OpenMP keeps workers for every thread that has computed. With those of two threads there are more than processors,
    and then they sleep between products: a token of 8 answers took 136 instead of 46 ms.
    """
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(load, base, world).result()
