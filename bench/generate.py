"""Greedy generation on the same prompts: ours, or transformers.generate; one JSON line.

    python bench/generate.py ours --prompts 32 --new-tokens 48
    python bench/generate.py peer --prompts 32 --new-tokens 48 --batch 8

Both draw exactly `--new-tokens` tokens a prompt (no end of turn), so tokens per second are of the same tokens. The peer
needs nothing but transformers and is loaded plainly; run it at several batch sizes and take its best.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import numpy as np
import torch


def main() -> None:
    """Generate twice (the first warms up), and print the rate of the second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=["ours", "peer"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--base", default="smollm2-135m-instruct", help="a built-in name or a folder")
    parser.add_argument("--lora", action="store_true", help="ours: with an adapter of rank 16")
    args = parser.parse_args()
    generate = ours(args) if args.system == "ours" else peer(args)
    generate(args.batch)
    start = time.perf_counter()
    answers = generate(args.prompts)
    seconds = time.perf_counter() - start
    assert all(len(answer) == args.new_tokens for answer in answers)
    rate = round(args.prompts * args.new_tokens / seconds, 1)
    line = {"system": args.system, "prompts": args.prompts, "batch": args.batch, "seconds": round(seconds, 2)}
    print(json.dumps(line | {"tokens_per_second": rate, "digest": sum(int(t) for a in answers for t in a)}))


def prompts(count: int, tokenizer) -> list[list[int]]:
    """Case references as the demo has them, 60 to 70 tokens each."""
    from tunesmith.data.render import prompt_tokens
    from tunesmith.data.tasks import legal_citations

    return [prompt_tokens(row.prompt, tokenizer) for row in legal_citations(count, 0)]


def ours(args: argparse.Namespace):
    """Tunesmith's sampler."""
    from tunesmith.model.load import load
    from tunesmith.model.lora import LoraShape, attach_lora
    from tunesmith.model.sample import Sampling, sample
    from tunesmith.world import world_from_env

    model = load(args.base, world_from_env())
    if args.lora:
        attach_lora(model.hf, LoraShape(rank=16, alpha=32.0), head=model.head)
    endless = replace(model, vocabulary=replace(model.vocabulary, eos_ids=()))
    how = Sampling(max_new_tokens=args.new_tokens, batch=args.batch)
    asked = [np.array(tokens) for tokens in prompts(args.prompts, model.tokenizer)]
    return lambda count: [answer.tokens.tolist() for answer in sample(endless, asked[:count], how)]


def peer(args: argparse.Namespace):
    """transformers.generate, prompts padded on the left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.model.load import resolve

    folder, gpu = resolve(args.base), torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if gpu else torch.float32).eval()
    model.to("cuda" if gpu else "cpu")
    asked = prompts(args.prompts, tokenizer)
    pad = tokenizer.pad_token_id

    def generate(count: int) -> list[list[int]]:
        answers: list[list[int]] = []
        for at in range(0, count, args.batch):
            rows = asked[at : min(at + args.batch, count)]
            longest = max(map(len, rows))
            ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            exactly = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
            with torch.no_grad():
                ids, mask = ids.to(model.device), mask.to(model.device)
                out = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=pad, **exactly)
            answers += out[:, longest:].tolist()
        return answers

    return generate


if __name__ == "__main__":
    main()
