"""Opens an export as its users will: in peft, transformers or llama.cpp, with that program's own template and decoding.

Run as a script in a process of its own (`python -P other_program.py FOLDER`), so it imports nothing of Tunesmith. It
reads FOLDER/request.json and writes FOLDER/reply.json and FOLDER/logits.npy, [positions V] in float32.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

Row = Mapping[str, Any]


@runtime_checkable
class Program(Protocol):
    """What is asked of each program."""

    name: str

    def prompt(self, row: Row) -> list[int]:
        """Tokens of a row's turns, through the export's own template and tokenizer."""
        ...

    def answers(self, prompts: Sequence[list[int]], most_tokens: int) -> list[list[int]]:
        """Greedy answers, the token that ends them included."""
        ...

    def text(self, tokens: list[int]) -> str:
        """An answer's text, without the token that ends it."""
        ...

    def logits(self, tokens: list[int], last: int) -> np.ndarray:
        """Logits [last V] at the last positions of a row."""
        ...


class Transformers:
    """A folder in plain transformers, or an adapter's folder in plain peft."""

    def __init__(self, path: str, batch: int, base: str = "") -> None:
        transformers = import_module("transformers")
        self.torch, self.batch = import_module("torch"), batch
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        # An adapter is kept in float32, and so was its base when it was judged; a folder says itself how it is stored.
        how = {"dtype": self.torch.float32} if base else {}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(base or path, use_safetensors=True, **how)
        end = self.model.generation_config.eos_token_id
        named = [self.tokenizer.eos_token_id] if end is None else end
        self.ends = named if isinstance(named, list) else [named]
        # The end of an answer is the export's own; penalties and temperatures of the base's makers are not.
        self.model.generation_config = transformers.GenerationConfig(eos_token_id=self.ends, pad_token_id=self.ends[0])
        self.name = f"transformers {version('transformers')}"
        if base:
            self.model = import_module("peft").PeftModel.from_pretrained(self.model, path)
            self.name = f"peft {version('peft')}, {self.name}"
        self.model.eval()

    def prompt(self, row: Row) -> list[int]:
        """See Program."""
        if not row["messages"]:
            return self.tokenizer(row["text"])["input_ids"][: len(row["tokens"])]
        how = {"tools": row["tools"] or None, "add_generation_prompt": True, "return_dict": True}
        return self.tokenizer.apply_chat_template(row["messages"], **how)["input_ids"]

    def answers(self, prompts: Sequence[list[int]], most_tokens: int) -> list[list[int]]:
        """See Program. Prompts of a batch are padded on the left."""
        found: list[list[int]] = []
        for start in range(0, len(prompts), self.batch):
            rows = prompts[start : start + self.batch]
            width = max(map(len, rows))
            tokens = self.torch.tensor([[self.ends[0]] * (width - len(row)) + row for row in rows])
            mask = self.torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            with self.torch.no_grad():
                how = {"do_sample": False, "max_new_tokens": most_tokens}
                made = self.model.generate(input_ids=tokens, attention_mask=mask, **how)[:, width:].tolist()
            for row in made:
                end = next((place + 1 for place, token in enumerate(row) if token in self.ends), len(row))
                found.append(row[:end])
        return found

    def text(self, tokens: list[int]) -> str:
        """See Program."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def logits(self, tokens: list[int], last: int) -> np.ndarray:
        """See Program."""
        with self.torch.no_grad():
            return self.model(input_ids=self.torch.tensor([tokens])).logits[0, -last:].float().numpy()


class LlamaCpp:
    """A .gguf file in llama.cpp. Keys and values are kept in float32, so that the file alone is measured."""

    def __init__(self, path: str, context_tokens: int) -> None:
        self.library = import_module("llama_cpp")
        threads = os.cpu_count()
        self.model = self.library.Llama(
            path, n_ctx=context_tokens, n_threads=threads, n_threads_batch=threads, type_k=0, type_v=0, verbose=False
        )
        self.vocabulary = self.library.llama_model_get_vocab(self.model.model)
        tokens = {int(key): self._piece(key) for key in (self.model.token_bos(), self.model.token_eos()) if key >= 0}
        formatter = import_module("llama_cpp.llama_chat_format").Jinja2ChatFormatter
        template = self.model.metadata["tokenizer.chat_template"]
        bos, eos = (tokens.get(key, "") for key in (self.model.token_bos(), self.model.token_eos()))
        self.template = formatter(template=template, eos_token=eos, bos_token=bos)
        self.name = f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}"

    def prompt(self, row: Row) -> list[int]:
        """See Program."""
        if not row["messages"]:
            text = row["text"]
            return self.model.tokenize(text.encode(), add_bos=True, special=True)[: len(row["tokens"])]
        text = self.template(messages=row["messages"], tools=row["tools"] or None).prompt
        return self.model.tokenize(text.encode(), add_bos=False, special=True)

    def answers(self, prompts: Sequence[list[int]], most_tokens: int) -> list[list[int]]:
        """See Program."""
        found = []
        for prompt in prompts:
            answer: list[int] = []
            for token in self.model.generate(prompt, temp=0.0, repeat_penalty=1.0):
                answer.append(token)
                if self._ends(token) or len(answer) == most_tokens:
                    break
            found.append(answer)
        return found

    def text(self, tokens: list[int]) -> str:
        """See Program."""
        shown = tokens[:-1] if tokens and self._ends(tokens[-1]) else tokens
        return self.model.detokenize(shown).decode(errors="replace")

    def logits(self, tokens: list[int], last: int) -> np.ndarray:
        """See Program. One token at a time, as llama.cpp keeps the logits of the newest only."""
        self.model.reset()
        size = self.model.n_vocab()
        rows = []
        first = len(tokens) - last + 1
        for part in (tokens[:first], *([token] for token in tokens[first:])):
            self.model.eval(part)
            pointer = self.library.llama_get_logits_ith(self.model.ctx, -1)
            rows.append(np.ctypeslib.as_array(pointer, shape=(size,)).copy())
        return np.stack(rows)

    def _ends(self, token: int) -> bool:
        return bool(self.library.llama_vocab_is_eog(self.vocabulary, token))

    def _piece(self, token: int) -> str:
        return self.model.detokenize([token], special=True).decode(errors="replace")


def opened(request: Mapping[str, Any]) -> Program:
    """The program that this kind of export is for, with the export in it."""
    if request["kind"] == "gguf":
        return LlamaCpp(request["path"], request["context_tokens"])
    return Transformers(request["path"], request["batch"], request["base"])


def quantise(request: Mapping[str, Any]) -> None:
    """llama.cpp's own quantizer, for the types that the gguf package cannot write."""
    library = import_module("llama_cpp")
    how = library.llama_model_quantize_default_params()
    how.ftype = request["file_type"]
    if library.llama_model_quantize(request["source"].encode(), request["path"].encode(), how):
        sys.exit("llama.cpp could not quantise the file")


def main(folder: Path) -> None:
    """Answer one request."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    if request["kind"] == "quantise":
        quantise(request)
        return
    program = opened(request)
    prompts = [program.prompt(row) for row in request["rows"]]
    tokens = program.answers([row["tokens"] for row in request["rows"]], request["max_new_tokens"])
    logits = [program.logits(row["tokens"], row["last"]) for row in request["forced"]]
    np.save(folder / "logits.npy", np.concatenate(logits))
    answers = [{"tokens": row, "text": program.text(row)} for row in tokens]
    reply = {"program": program.name, "prompts": prompts, "answers": answers}
    (folder / "reply.json").write_text(json.dumps(reply), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
