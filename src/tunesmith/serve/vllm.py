"""vLLM behind the same command: what the runs handed over, with the template, ends of turn and names they had here.

vLLM is a program of its own, found beside this Python or on the PATH: it wants its own version of torch, so it usually
has an environment of its own. It computes in bfloat16 with its own kernels, so its answers are close to those that were
judged and not the same bits.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import ModelError
from ..folder import read_json, write_json, write_text
from ..model.load import Vocabulary, load_vocabulary
from ..screen import Screen
from .hall import Lineup

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be told to make room for


def find_vllm() -> str:
    """The program, or nothing."""
    return shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}") or ""


def serve_by_vllm(
    program: str, lineup: Lineup, address: tuple[str, int], key: str, context_tokens: int, screen: Screen
) -> None:
    """Run vLLM until it ends; SIGTERM and Ctrl-C are handed on. Raises ModelError where it fails."""
    vocabulary = load_vocabulary(str(lineup.base))
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as beside:
        words = [program, *arguments(lineup, vocabulary, address, context_tokens, Path(beside))]
        screen.line(" ".join(words))
        # In the environment, because every user of a machine can read a command's words.
        environment = {**os.environ, **({"VLLM_API_KEY": key} if key else {})}
        code = _run(words, environment)
    if code not in (0, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT):
        fix = "Read its messages above; --engine own serves without it."
        raise ModelError(f"vLLM ended with status {code}", where=program, fix=fix)


def arguments(
    lineup: Lineup, vocabulary: Vocabulary, address: tuple[str, int], context_tokens: int, beside: Path
) -> Sequence[str]:
    """The words after `vllm`; template and ends of turn are written into `beside`, for vLLM reads them its own way."""
    # With this folder vLLM also leaves the base's own temperature alone: 1 is the default here and at OpenAI.
    write_json(beside / "generation_config.json", {"eos_token_id": list(vocabulary.eos_ids)})
    words = ["serve", str(lineup.base), "--served-model-name", lineup.name]
    words += ["--host", address[0], "--port", str(address[1])]
    words += ["--dtype", "bfloat16", "--max-model-len", str(min(context_tokens, vocabulary.context_tokens))]
    words += ["--generation-config", str(beside)]
    if isinstance(template := vocabulary.tokenizer.chat_template, str):  # of several vLLM chooses as training did
        write_text(beside / "chat_template.jinja", template)
        words += ["--chat-template", str(beside / "chat_template.jinja")]
    if lineup.adapters:
        ranks = [read_json(run.path / "adapter_config.json")["r"] for run in lineup.adapters]
        words += ["--enable-lora", "--max-loras", str(len(ranks)), "--max-lora-rank", str(_room(max(ranks)))]
        words += ["--lora-modules", *(f"{run.name}={run.path.resolve()}" for run in lineup.adapters)]
    return words


def _room(rank: int) -> int:
    """The smallest room that holds `rank`. Raises ModelError where none does."""
    if rank > RANKS[-1]:
        fix = "Serve the run with --engine own, or export it with --to merged and serve that."
        raise ModelError(f"vLLM holds adapters up to rank {RANKS[-1]}", where=f"rank {rank}", fix=fix)
    return next(room for room in RANKS if room >= rank)


def _run(words: Sequence[str], environment: dict[str, str]) -> int:
    """Its status, once it has ended. The first signal is handed on; a second one ends it and all it started at once.

    The first goes to vLLM alone, which lets answers under way end before it stops its own processes.
    """
    asked: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: object) -> None:
        asked.append(number)
        for process in processes:
            if len(asked) == 1:
                process.send_signal(number)
            else:
                _kill_all(process)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # In a session of its own, so that a terminal's Ctrl-C reaches it once, through here.
        processes.append(subprocess.Popen(words, env=environment, start_new_session=True))
        if asked:
            hand_on(asked.pop(), None)
        return processes[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            _kill_all(process)  # what it left running


def _kill_all(leader: subprocess.Popen[bytes]) -> None:
    """End the process and all of its session that are still there."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
