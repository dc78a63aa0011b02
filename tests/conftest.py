"""What tests share: shape checks while testing, and a tokenizer, a model and rows small enough to build in-process.

torch is imported only by the fixtures that need it, so that tests of reports and folders stay light.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import shutil
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

gc.disable()  # while tests are imported: what is imported is never garbage, and looking at it is a tenth of the suite


def pytest_collection_finish() -> None:
    """Look after what tests make alone."""
    gc.freeze()
    gc.enable()


settings.register_profile("untimed", deadline=None)  # how long an example takes depends on what else runs
settings.load_profile("untimed")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tunesmith.model.load import Model
    from tunesmith.types import Example
    from tunesmith.world import World

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MPLBACKEND="Agg"
)
# From here on every call checks its types and shapes; an int is a float, as it is to type checkers. A GPU's compiler
# cannot read such checks, so `make test-gpu` goes without.
if not os.environ.get("TUNESMITH_UNCHECKED"):
    install_import_hook("tunesmith", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a tiny assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS_TEMPLATE = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHAT_TEMPLATE.replace(
    "<|im_end|>\n{% endfor %}",
    "{% for call in message.tool_calls or [] %}<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}",
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens with a ChatML template; pad (id 0) is not eos (id 2)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(["system user assistant You are a tiny assistant. Upper case of: "] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def beginning_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tiny tokenizer without a template, beginning each text with its bos (id 1), as those of Llama's bases do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{TURN_START} $A", pair=f"{TURN_START} $A {TURN_START} $B", special_tokens=[(TURN_START, 1)]
    )
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="session")
def beginning_model_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, beginning_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The tiny model with that tokenizer."""
    folder = shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("beginning") / "model")
    (folder / "chat_template.jinja").unlink()
    beginning_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A transformers folder with a random llama: 2 layers, width 64, 4 heads, 2 key-value heads, tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of 120 different rows that a tiny model can learn: the upper case of a short word."""
    draw = random.Random(0)
    words = sorted({"".join(draw.choices("abcdefgh", k=3)) for _ in range(400)})
    path = tmp_path_factory.mktemp("tiny-rows") / "rows.jsonl"
    rows = [{"prompt": f"Upper case of: {word}", "completion": word.upper()} for word in draw.sample(words, 120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_examples(tiny_tokenizer: PreTrainedTokenizerFast, tiny_rows: Path) -> list[Example]:
    """The 120 rows, rendered."""
    from tunesmith.data.render import render
    from tunesmith.types import Conversation, Message

    rows = [json.loads(line) for line in tiny_rows.read_text(encoding="utf-8").splitlines()]
    examples = []
    for number, row in enumerate(rows, start=1):
        turns = (Message(role="user", content=row["prompt"]), Message(role="assistant", content=row["completion"]))
        conversation = Conversation(messages=turns, id=f"row{number}", source=f"rows.jsonl:{number}")
        examples += render(conversation, tiny_tokenizer, [tiny_tokenizer.eos_token_id])
    return examples


@pytest.fixture(scope="session")
def tools_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The tiny model with a template that writes tools and calls; the other leaves them out."""
    folder = shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("tools") / "model")
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture
def fresh_model(tiny_model_folder: Path) -> Model:
    """The tiny model, loaded for one test, which may change it."""
    from tunesmith.model.load import load
    from tunesmith.world import World

    return load(str(tiny_model_folder), World())


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder: Path) -> Model:
    """The tiny model, loaded once; no test may change it."""
    from tunesmith.model.load import load
    from tunesmith.world import World

    return load(str(tiny_model_folder), World())


@pytest.fixture(scope="session")
def tiny_recipe(tiny_model_folder: Path, tiny_rows: Path) -> Callable[..., dict[str, Any]]:
    """Makes recipes, as mappings, that take seconds: the tiny model on the tiny rows. Dotted keys replace values."""

    def make(changes: Mapping[str, object] | None = None) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "base": str(tiny_model_folder),
            "data": {"train": str(tiny_rows), "valid": 0.2, "test": 0.3},
            "task": {"instructions": "Give the upper case.", "shots": 2, "also": ["token_f1"], "max_new_tokens": 4},
            "train": {"batch": 8, "max_steps": 4, "evaluations": 2, "learning_rate": 0.01},
            "lora": {"rank": 4},
            "evaluate": {"rows": 20, "valid_rows": 8, "forgetting": False},
        }
        for key, value in (changes or {}).items():
            *parents, leaf = key.split(".")
            node = raw
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return raw

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Callable[..., dict[str, Any]]) -> Path:
    """The recipe of a run that is finished, lora and full, in the folder `run` beside it. Only read it."""
    import yaml

    from tunesmith import load_recipe, run

    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "recipe.yaml"
    changes = {"out": str(folder / "run"), "update": ["lora", "full"], "evaluate.forgetting": True}
    recipe.write_text(yaml.safe_dump(tiny_recipe(changes)))
    run(load_recipe(recipe))
    return recipe


class ChatServer:
    """An OpenAI-compatible endpoint on a free port: answers with `say`, after the faults that it was given.

    A fault is the status and headers of one answer, or what goes wrong with it: `disconnect`, `garbage`, `silence`,
    `drip`. `asked` holds the last message of every request, `bodies` and `keys` what else came with it.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[str | tuple[int, dict[str, str], object]] = []
        self.say: Callable[[str], str] = lambda question: question.rpartition(": ")[2].upper()
        self.finish = "stop"
        self.before: Callable[[str], None] = lambda question: None
        self.closing, self._lock = threading.Event(), threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                with suppress(ConnectionError):
                    chat._answer(self)

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self._lock:
            self.asked.append(question)
            self.bodies.append(body)
            self.keys.append(request.headers["Authorization"])
            fault = self.faults.pop(0) if self.faults else None
        self.before(question)
        usage = {"prompt_tokens": 50, "completion_tokens": 3}
        choice = {"message": {"role": "assistant", "content": self.say(question)}, "finish_reason": self.finish}
        match fault:
            case (status, headers, content):
                self._send(request, int(status), dict(headers), content)
            case "disconnect":
                request.close_connection = True
            case "garbage":
                self._send(request, 200, {}, ["no", "completion"])
            case "silence":
                self.closing.wait()
            case "drip":
                request.send_response(200)
                request.send_header("Content-Length", "1000000")
                request.end_headers()
                while not self.closing.wait(0.01):
                    request.wfile.write(b" ")
            case _:
                self._send(request, 200, {}, {"choices": [choice], "usage": usage})

    def _send(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: object) -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    """A real server in a thread, for one test."""
    chat = ChatServer()
    thread = threading.Thread(target=chat.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield chat
    chat.closing.set()
    chat.server.shutdown()
    chat.server.server_close()
    thread.join()


@pytest.fixture
def two_ranks(fork: Callable[[Callable[[], object]], int]) -> Callable[[Callable[[World], object]], None]:
    """Do the same work in two processes that torchrun's environment joins, and see both end well."""

    def together(work: Callable[[World], object]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def rank(number: int) -> None:
            from torch import distributed

            from tunesmith.world import world_from_env

            os.environ.update(WORLD_SIZE="2", RANK=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            work(world_from_env())
            distributed.destroy_process_group()

        children = [fork(lambda number=number: rank(number)) for number in range(2)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]

    return together


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], object]], int]]:
    """Start a function in a process of its own and return its id; whatever still runs at the end is killed.

    A forked child has torch loaded already, so that a test can afford to kill dozens of them.
    """
    started: list[int] = []

    def start(work: Callable[[], object]) -> int:
        child = os.fork()
        if child:
            started.append(child)
            return child
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    yield start
    for child in started:
        with suppress(ChildProcessError):  # it was waited for
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
