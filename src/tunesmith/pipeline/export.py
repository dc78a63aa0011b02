"""`tunesmith export`: a finished run's model for other programs, handed over only if it is still the model judged.

    read what was judged -> write the export aside -> open it in the other program -> compare -> put it in place

An export that falls short is not kept; what was compared is, as exports/<name>.failed.json in the run folder.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..data.layout import message_of
from ..data.render import as_turn, end_of_turn
from ..errors import FolderError, ModelError, RecipeError, TunesmithError
from ..evaluate.measure import scored
from ..evaluate.metrics import MODEL_METRICS, find_metric
from ..evaluate.parity import Bounds, Reference, ask_elsewhere, compare, differences, refer, run_elsewhere
from ..evaluate.stats import contrast
from ..folder import (
    locked,
    read_json,
    read_jsonl,
    sweep,
    write_json,
    write_manifest,
    write_text,
    written_aside,
)
from ..model.adapters import write_generation
from ..model.builtin import builtin_model
from ..model.load import Model, Vocabulary, load_vocabulary, resolve
from ..model.merge import write_plain
from ..model.modelfile import modelfile
from ..model.sample import Sampling
from ..model.write_gguf import TYPES, check_architecture, write_gguf
from ..report.exports import export_sentence
from ..report.page import write_report
from ..screen import Screen
from ..types import Contrast, Item
from ..world import World
from .handed import Made, made_by, open_made

LLAMA_CPP_TYPES = {"q3_k_m": 12, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # llama.cpp quantises these itself
KINDS = {"adapter": ("f32",), "merged": ("f32", "bf16", "f16"), "gguf": ("q8_0", *TYPES, *LLAMA_CPP_TYPES)}
PROGRAMS = {"adapter": ("peft", "peft"), "gguf": ("llama_cpp", "llama-cpp-python")}
EXACT = Bounds(logits=1e-3, kl_nats=1e-6, alike=0.99)
BOUNDS = {
    "f32": EXACT,
    "f16": Bounds(kl_nats=1e-3),
    "bf16": Bounds(kl_nats=1e-2),
    "q8_0": Bounds(kl_nats=1e-2),
}
COARSE = Bounds(kl_nats=0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to export and where to; an empty `type`, `out` or `update` is derived."""

    to: str
    type: str = ""
    out: Path | None = None
    update: str = ""
    rows: int = 100
    checked: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A finished run and how it was judged."""

    made: Made
    kind: str
    type: str
    answers: Sequence[Mapping[str, Any]]
    how: Sampling
    root: Path

    @property
    def name(self) -> str:
        """Of the export's folder: its kind, and its type where that is not float32."""
        return self.kind if self.type == "f32" and self.kind != "gguf" else f"{self.kind}-{self.type}"

    def open(self) -> Model:
        """The model that was judged, in the engine that judged it."""
        return open_made(self.made, World())


def export(run_folder: Path, wanted: Wanted, screen: Screen) -> dict[str, Any]:
    """Write and check one export; returns what parity.json says, with `passed` and `path`. Raises TunesmithError."""
    job = _read(run_folder, wanted)
    out = wanted.out or job.made.run.path / "exports" / job.name
    _refuse_foreign(out)
    with locked(job.made.run):
        sweep(job.made.run.path / "exports")
        screen.stage("Reference", f"{len(job.answers)} test rows, answered by the run's own model")
        reference, vocabulary = _reference(job)
        record = {"schema": 1, "tunesmith": __version__, "kind": job.kind, "type": job.type, "update": job.made.update}
        record |= {"path": str(out), "checked": wanted.checked, "passed": False}
        failed = job.made.run.path / "exports" / f"{job.name}.failed.json"
        try:
            with written_aside(out) as folder:
                screen.stage("Write", str(out))
                target = _write(job, reference, vocabulary, folder)
                if wanted.checked:
                    screen.stage("Check", "opened by the program that it is for")
                    record |= _checked(job, reference, target)
                    if record["reasons"]:
                        raise _FallsShort
                record["passed"] = wanted.checked
                write_json(folder / "parity.json", record)
                write_manifest(folder)
        except _FallsShort:
            write_json(failed, record)
        else:
            write_json(failed.with_name(f"{job.name}.json"), record)
            failed.unlink(missing_ok=True)
        write_report(job.made.run.path)
    return record


def show_export(record: Mapping[str, Any], screen: Screen) -> None:
    """What was compared and how it ended, as the report says it."""
    screen.line(export_sentence(record))
    for reason in record.get("reasons", ()):
        screen.line(f"falls short: {reason}")


class _FallsShort(Exception):
    """Leave the block in which an export is written, so that nothing of it stays."""


# What is asked for


def _read(run_folder: Path, wanted: Wanted) -> Job:
    """Everything that can be wrong before work begins."""
    kind, stored = _kind(wanted)
    made = made_by(run_folder, wanted.update, hashes=True)
    if kind == "adapter" and made.update == "full":
        what = "all weights were tuned, so there is no adapter"
        other = next((update for update in made.recipe.update if update != "full"), "")
        fix = f"Use --to merged, or --update {other}." if other else "Use --to merged."
        raise RecipeError(what, where="--to adapter", fix=fix)
    answers, plan = read_jsonl(made.run.answers(made.update))[: wanted.rows], read_json(made.run.plan)
    if not answers or not {"root", "max_new_tokens"} <= set(plan):
        fix = "Delete the run folder, or set another `out`, and run the recipe again."
        raise FolderError("keeps no answers to compare with", where=str(run_folder), fix=fix)
    return Job(
        made=made,
        kind=kind,
        type=stored,
        answers=answers,
        how=Sampling(max_new_tokens=plan["max_new_tokens"], batch=made.recipe.evaluate.batch),
        root=Path(plan["root"]),
    )


def _kind(wanted: Wanted) -> tuple[str, str]:
    """Kind and type of the export, both known, and the program to check it with at hand."""
    if wanted.to not in KINDS:
        raise RecipeError(f"unknown export {wanted.to!r}", where="--to", fix=f"Choose one of: {', '.join(KINDS)}.")
    types = tuple(dict.fromkeys(KINDS[wanted.to]))
    stored = (wanted.type or types[0]).lower()
    if stored not in types:
        raise RecipeError(f"unknown type {stored!r}", where="--type", fix=f"{wanted.to} has: {', '.join(types)}.")
    module, package = PROGRAMS.get(wanted.to, ("transformers", "transformers"))
    by_llama_cpp = stored in LLAMA_CPP_TYPES
    if (wanted.checked or by_llama_cpp) and find_spec(module) is None:
        need = f"{stored} is quantised by llama.cpp itself" if by_llama_cpp else "the export is checked in the program"
        fix = f"pip install '{package}' (or 'tunesmith[export]')"
        fix += "" if by_llama_cpp else ", or add --unchecked to take it on trust."
        raise ModelError(f"{package} is not installed, and {need} that it is for", where=f"--to {wanted.to}", fix=fix)
    return wanted.to, stored


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not (out / "parity.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise FolderError("holds something that is not an export", where=str(out), fix="Choose another --out.")


def _reference(job: Job) -> tuple[Reference, Vocabulary]:
    """The judged model's prompts, answers and logits. Raises ModelError where rows no longer give the same prompts."""
    model = job.open()
    if job.kind == "gguf":
        check_architecture(model.hf.config, model.vocabulary.folder)
    generated = job.made.recipe.method == "sft" and not set(job.answers[0]["scores"]) <= MODEL_METRICS  # and greedily
    before = [line["answer"] if generated else None for line in job.answers]
    reference = refer(model, [_item(line) for line in job.answers], before, job.how)
    for row, line in zip(reference.rows, job.answers, strict=True):
        if row.item.prompt and line.get("prompt_tokens", len(row.prompt)) != len(row.prompt):
            what = f"row {line['id']} had {line['prompt_tokens']} prompt tokens when judged, now {len(row.prompt)}"
            fix = (
                "The base's template or tokenizer has changed, or the row has tools and an old run: set another `out`, "
            )
            fix += "and run again."
            raise ModelError(what, where=str(job.made.run.path), fix=fix)
    return reference, model.vocabulary


def _item(line: Mapping[str, Any]) -> Item:
    prompt, tools = tuple(map(message_of, line["prompt"])), tuple(line.get("tools", ()))
    return Item(prompt=prompt, reference=line["reference"], id=line["id"], tools=tools)


# Writing


def _write(job: Job, reference: Reference, vocabulary: Vocabulary, folder: Path) -> Path:
    """Fill the folder; returns what the other program is to open."""
    if job.kind == "adapter":
        _write_adapter(job, vocabulary, folder)
        return folder
    if job.kind == "merged":
        _write_merged(job, vocabulary, folder, {"f32": torch.float32, "bf16": torch.bfloat16}.get(job.type, torch.half))
        return folder
    target = folder / f"model-{job.type}.gguf"
    end = end_of_turn(vocabulary.tokenizer, vocabulary.eos_ids)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        plain = Path(name)
        _write_merged(job, vocabulary, plain, torch.float32)
        by_llama_cpp = job.type in LLAMA_CPP_TYPES
        first = plain / "first.gguf" if by_llama_cpp else target
        title = job.made.run.path.resolve().name
        write_gguf(plain, first, "f32" if by_llama_cpp else job.type, load_vocabulary(str(plain)), end, title)
        if by_llama_cpp:
            file_type = LLAMA_CPP_TYPES[job.type]
            request = {"kind": "quantise", "source": str(first), "path": str(target), "file_type": file_type}
            run_elsewhere(request, plain)
    turns = [[as_turn(message) for message in row.item.prompt] for row in reference.rows if not row.item.tools]
    ends = [
        str(vocabulary.tokenizer.convert_ids_to_tokens(token))
        for token in {end: None, **dict.fromkeys(vocabulary.eos_ids)}
    ]
    longest = max(len(row.prompt) for row in reference.rows) + job.how.max_new_tokens
    told = modelfile(target.name, vocabulary.tokenizer, [t for t in turns if t], ends, longest)
    write_text(folder / "Modelfile", told)
    return target


def _write_adapter(job: Job, vocabulary: Vocabulary, folder: Path) -> None:
    """The run's adapter, naming its base so that peft finds it from anywhere."""
    for path in sorted(job.made.path.iterdir()):
        if path.is_file() and path.name != "manifest.json":
            shutil.copyfile(path, folder / path.name)
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": _base_name(job.made.recipe.base)})
    vocabulary.tokenizer.save_pretrained(folder)


def _base_name(base: str) -> str:
    """A hub id as it is, anything else as the absolute path of its plain folder."""
    is_hub_id = builtin_model(base) is None and not Path(base).expanduser().exists()
    return base if is_hub_id else str(resolve(base).resolve())


def _write_merged(job: Job, vocabulary: Vocabulary, folder: Path, dtype: torch.dtype) -> None:
    """A plain folder: weights, the tokenizer and template that were used, and how answers end."""
    if job.made.update == "full":
        write_plain(job.made.path, None, folder, dtype)
    else:
        write_plain(resolve(job.made.recipe.base), job.made.path, folder, dtype)
    vocabulary.tokenizer.save_pretrained(folder)
    write_generation(folder, vocabulary.eos_ids)


# Checking


def _checked(job: Job, reference: Reference, target: Path) -> dict[str, Any]:
    """What was compared, with the reasons why it falls short, if it does."""
    base = _base_name(job.made.recipe.base) if job.kind == "adapter" else ""
    bounds = EXACT if job.kind == "adapter" else BOUNDS.get(job.type, COARSE)
    try:
        reply = ask_elsewhere(job.kind, target, base, reference, job.how)
        same = all(row.text == text for row, text in zip(reference.rows, reply.texts, strict=True))
        differing = [] if same else differences(job.open(), reference, reply)
        score, unscored = _score(job, reference, reply.texts)
        found = compare(reference, reply, differing, score, bounds)
    except ModelError as error:
        return {"reasons": [error.what]}
    return {**found, **({"unscored": unscored} if unscored else {})}


def _score(job: Job, reference: Reference, texts: Sequence[str]) -> tuple[Contrast | None, str]:
    """The task score of the export minus that of the judged answers, or why it cannot be told."""
    task, evaluate = job.made.recipe.task, job.made.recipe.evaluate
    if job.made.recipe.method != "sft":
        return None, "the policy's answers were sampled and scored by its reward, so logits and answers decide"
    metric = next((name for name in (task.metric, *task.also) if name not in MODEL_METRICS), "")
    if not metric:
        return None, "the metrics are of the model's probabilities, so logits and answers decide"
    items = [row.item for row in reference.rows]
    given = [line["answer"] for line in job.answers]
    stored = np.array([line["scores"][metric] for line in job.answers])
    try:
        grade = find_metric(metric, task, job.root)
        again, found = np.array(grade(items, given), dtype=float), np.array(grade(items, texts), dtype=float)
    except TunesmithError as error:
        return None, f"{metric} could not be computed again ({error.what})"
    if not np.allclose(again, stored):
        return None, f"{metric} gives the judged answers other scores now, so it reads more than prompt and reference"
    ids = [item.id for item in items]
    exported, judged = (scored(arm, ids, {metric: scores}) for arm, scores in (("exported", found), ("judged", stored)))
    return contrast(exported, judged, metric, evaluate.level, evaluate.seed), ""
