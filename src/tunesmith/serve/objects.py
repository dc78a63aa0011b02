"""Files, jobs, events and checkpoints as OpenAI's clients read them, and what the page in the browser draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..folder import RunFolder, read_json, read_jsonl, storage_errors
from ..recipe import PreferenceSpec
from .files import File
from .guard import ticket
from .jobs import Event, Job, Store
from .orders import hyperparameters

PAGE_PATH = "/jobs"
LOG_BYTES = 64 * 1024
MOST_POINTS = 500


def file_object(file: File) -> Mapping[str, Any]:
    """The file as OpenAI's clients read it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }


def job_object(store: Store, key: str, job: Job) -> Mapping[str, Any]:
    """The job as OpenAI's clients read it; `tunesmith` holds what that API has no place for."""
    run = RunFolder(path=store.run(job.id))
    asked, done = job.asked, job.status == "succeeded"
    verdict = read_json(run.results)["verdict"] if done and run.results.is_file() else None
    path = f"{PAGE_PATH}/{job.id}/report"
    word = ticket(key, path)
    link = path + (f"?ticket={word}" if word else "") if run.report.is_file() else None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": asked["model"],
        "created_at": job.created,
        "finished_at": job.finished,
        "fine_tuned_model": job.model if done else None,
        "organization_id": "tunesmith",
        "result_files": [job.result] if job.result else [],
        "status": job.status,
        "validation_file": asked["validation_file"],
        "training_file": asked["training_file"],
        "hyperparameters": _settled(run, hyperparameters(asked)),
        "trained_tokens": job.tokens,
        "error": job.error,
        "seed": asked["seed"],
        "estimated_finish": None,
        "integrations": [],
        "metadata": asked["metadata"],
        "method": asked["method"],
        "user_provided_suffix": asked["suffix"],
        "tunesmith": {"verdict": verdict, "run": str(run.path), "report": link},
    }


def event_object(job: str, event: Event) -> Mapping[str, Any]:
    """The event as OpenAI's clients read it."""
    return {
        "id": f"ftevent-{job.partition('-')[2]}-{event.number}",
        "object": "fine_tuning.job.event",
        "created_at": event.created,
        "level": event.level,
        "message": event.message,
        "type": "message" if event.data is None else "metrics",
        "data": event.data or {},
    }


def checkpoint_object(store: Store, job: Job) -> Mapping[str, Any]:
    """The one checkpoint that is kept: the best weights, which are what is served."""
    run = RunFolder(path=store.run(job.id))
    results = read_json(run.results)
    step = int(results["arms"][results["subject"]]["train"]["best_step"])
    lines = [line for line in read_jsonl(run.metrics) if line["step"] == step]
    merged = {key: value for line in lines for key, value in line.items()}
    metrics = {"step": step, "train_loss": merged.get("loss"), "valid_loss": merged.get("valid_loss")}
    return {
        "id": f"ftckpt-{job.id.partition('-')[2]}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": job.finished,
        "fine_tuned_model_checkpoint": job.model,
        "fine_tuning_job_id": job.id,
        "step_number": step,
        "metrics": metrics,
    }


def _settled(run: RunFolder, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Hyperparameters, with what the run derived in the place of `auto`."""
    if not run.plan.is_file() or "compute_multiplier" in given:  # rollouts are planned in other words
        return given
    derived = {line["key"]: line["value"] for line in read_json(run.plan)["derived"]}
    found = {"n_epochs": derived.get("train.epochs"), "batch_size": derived.get("train.batch")}
    found |= {"learning_rate_multiplier": 1.0, "beta": PreferenceSpec().beta}
    return {key: found.get(key) or value if value == "auto" else value for key, value in given.items()}


def points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Step and value of every line that has one, thinned evenly to what a chart can show."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    every = -(-len(found) // MOST_POINTS) or 1
    return found[:: every or 1] if every == 1 else [*found[::every], found[-1]]


def steps_of(store: Store, job: str) -> int | None:
    plan = RunFolder(path=store.run(job)).plan
    if not plan.is_file():
        return None
    return next((arm["steps"] for arm in read_json(plan)["arms"].values()), None)


def tail(log: Path) -> str:
    """The end of a log."""
    if not log.is_file():
        return ""
    with storage_errors(log), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        return file.read().decode("utf-8", "replace")
