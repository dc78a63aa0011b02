"""`tunesmith serve`: from run folders to a listening server, and to its end.

    tunesmith serve runs/legal_citations runs/support --port 8000

The first SIGTERM or Ctrl-C closes the door: answers under way and in the queue are finished, then the process ends.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Literal

from ..errors import ModelError, RecipeError
from ..screen import Screen
from ..world import World, world_from_env
from .app import server_app
from .ending import DRAIN_SECONDS, Server
from .engine import Limits
from .guard import Gate
from .hall import Hall, line_up, opened
from .listen import LOOPBACK, bound, is_loopback, url_of
from .objects import PAGE_PATH
from .problems import error_body
from .tuning import FILES, Desk, Shop, held, opened_desk, tuning_routers
from .vllm import find_vllm, serve_by_vllm

MOST_BODY_BYTES = 4 * 1024 * 1024
PUBLIC = frozenset({"/health"})
Engines = Literal["auto", "own", "vllm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Where a server listens and who may come in."""

    host: str = LOOPBACK
    port: int = 8000
    key: str = ""
    names: tuple[str, ...] = ()


def serve(
    models: Sequence[str],
    door: Door,
    limits: Limits,
    screen: Screen,
    *,
    update: str = "",
    shop: Shop | None = None,
    engine: Engines = "auto",
) -> None:
    """Serve until told to stop. Raises TunesmithError where a run, the address or the port cannot be used."""
    gate = gate_for(door, tuning=shop is not None)
    world = world_from_env()
    if program := _vllm(engine, world, alone=is_loopback(door.host), jobs=shop is not None):
        with closing(bound(door.host, door.port)) as free:  # a port in use is said before weights are read
            port = int(free.getsockname()[1])
        screen.warn(f"answered by {program} in bfloat16: close to what was judged, not the same bits")
        screen.warn("vLLM asks for the key under /v1 only, and checks neither Host nor Origin as --engine own does")
        serve_by_vllm(program, line_up(models, update), (door.host, port), door.key, limits.context_tokens, screen)
        return
    with ExitStack() as stack:
        server_socket = stack.enter_context(closing(bound(door.host, door.port)))
        if shop:
            stack.enter_context(held(shop.folder))
        hall = opened(line_up(models, update), limits, world)
        desk = None
        if shop:
            desk = stack.enter_context(opened_desk(shop, hall, screen, key=door.key))
        address = url_of(door.host, server_socket.getsockname()[1])
        if shop:
            screen.line(f"fine-tuning jobs in {shop.folder}, {shop.at_once} at once: {address}/jobs")
        _announce(hall, f"{address}/v1", screen)
        server = run_server(hall, gate, server_socket, desk)
    screen.line(server.ended() + (", a job at work goes on by itself" if shop and server.force_exit else ""))


def _vllm(engine: Engines, world: World, *, alone: bool, jobs: bool) -> str:
    """The vLLM to start, or nothing where our own sampler answers. Raises TunesmithError.

    Where others than this machine reach the address, vLLM, whose key guards only a part, has to be asked for by name.
    """
    program = find_vllm() if engine != "own" else ""
    if engine == "vllm" and not program:
        fix = "pip install 'tunesmith[vllm]', or put an environment's `vllm` on the PATH."
        raise ModelError("vLLM is not installed", where="--engine vllm", fix=fix)
    if engine == "vllm" and jobs:
        fix = "Leave --engine out, or serve the finished runs without --jobs."
        raise RecipeError("vLLM takes no fine-tuning jobs", where="--engine vllm --jobs", fix=fix)
    return program if engine == "vllm" or (world.device.type == "cuda" and alone and not jobs) else ""


def run_server(hall: Hall, gate: Gate, server_socket: socket.socket, desk: Desk | None = None) -> Server:
    """Answer on the socket until a signal, then finish what was accepted; a second Ctrl-C forbids that."""
    server, before = http_server(hall, gate, desk), signal.signal(signal.SIGTERM, _drained)
    try:
        with suppress(KeyboardInterrupt):  # the usual way to stop
            server.run(sockets=[server_socket])
        return server
    finally:
        signal.signal(signal.SIGTERM, before)
        hall.engine.close()


def http_server(hall: Hall, gate: Gate, desk: Desk | None = None, drain_seconds: int = DRAIN_SECONDS) -> Server:
    """The HTTP side of it, not started yet."""
    app = server_app(hall, gate)
    if desk:
        app = server_app(hall, gate, more=tuning_routers(desk), lifespan=desk.foreman.at_work)
    return Server(app, lifespan="on" if desk else "off", drain_seconds=drain_seconds)


def gate_for(door: Door, *, tuning: bool = False) -> Gate:
    """Loopback needs no key; any other address does. Raises RecipeError."""
    policy = "default-src 'none'; frame-ancestors 'none'"
    loopback = is_loopback(door.host)
    if not loopback and not door.key:
        fix = "Set TUNESMITH_KEY (or --key), and put TLS before the server; or listen on 127.0.0.1."
        raise RecipeError("an address that others can reach needs a key", where=f"--host {door.host}", fix=fix)
    if not door.key.isascii() or any(letter.isspace() for letter in door.key):
        raise RecipeError("a key is ASCII without spaces", where="--key", fix="openssl rand -hex 32 makes one.")
    known = {"127.0.0.1", "localhost", "[::1]", *(name.lower() for name in door.names)}
    if not loopback:
        known |= {socket.gethostname().lower(), door.host.lower()}
    return Gate(
        policy=policy,
        hosts=frozenset(known),
        any_address=not loopback,
        key=door.key,
        public=PUBLIC | {PAGE_PATH} if tuning else PUBLIC,
        uploads=frozenset({FILES}) if tuning else frozenset(),
        most_body_bytes=MOST_BODY_BYTES,
        body=error_body,
    )


def _announce(hall: Hall, address: str, screen: Screen) -> None:
    limits = hall.engine.limits
    screen.line(f"models: {', '.join(hall.served)}")
    screen.line(f"{limits.rows} answers at once, {limits.waiting} waiting, context {limits.context_tokens} tokens")
    if hall.model.device.type == "cuda":
        screen.warn("answered by Tunesmith's own sampler in bfloat16; vLLM is faster on a GPU (tunesmith[vllm])")
    screen.line(f"{address}   (stop with Ctrl-C or SIGTERM; answers under way are finished)")


def _drained(number: int, frame: object) -> None:
    """uvicorn finishes its requests on SIGTERM and then raises it again; that shall not end the process early."""
