"""Fine-tuning over HTTP, in the shape of OpenAI's API.

    POST GET        /v1/files                                    upload, list
    GET DELETE      /v1/files/ID, GET /v1/files/ID/content
    POST GET        /v1/fine_tuning/jobs                         create, list
    GET             /v1/fine_tuning/jobs/ID, .../events, .../checkpoints
    POST            /v1/fine_tuning/jobs/ID/cancel, .../pause, .../resume

Ours, for the page in the browser:

    GET             /jobs                                        the page; holds nothing, so it needs no key
    GET             /jobs/ID/report                              the run's report, by a link that bears a ticket
    GET             /v1/fine_tuning/jobs/ID/progress             losses and the end of the log
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import FileResponse, HTMLResponse

from ..errors import TunesmithError
from ..folder import RunFolder, locked, read_jsonl, storage_errors, write_text
from ..screen import Screen
from .files import (
    MOST_FILE_BYTES,
    PURPOSE,
    File,
    delete_file,
    find_file,
    list_files,
    path_of,
    sweep,
    take_upload,
)
from .graders import GRADER_FILE, grader_file
from .guard import content_policy
from .hall import Hall
from .jobs import (
    Job,
    Status,
    Store,
    add_job,
    find_job,
    known_job,
    list_events,
    list_jobs,
    move,
    new_id,
    open_store,
    queue_again,
)
from .objects import PAGE_PATH, checkpoint_object, event_object, file_object, job_object, points, steps_of, tail
from .orders import JobBody, grader_of, order, recipe_of
from .problems import Problem
from .workers import INVALID_FILE, Foreman

PAGE = Path(__file__).parent / "static" / "jobs.html"
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
FILES, JOBS = "/v1/files", "/v1/fine_tuning/jobs"
Token = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=256)]
After = Annotated[str | None, Query(max_length=256)]
Limit = Annotated[int, Query(ge=1, le=100)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    """Where jobs are kept, how many are worked on at once, and whether they may bring Python."""

    folder: Path
    at_once: int = 1
    python_graders: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What the routes work with. `key` is the server's own, for links that a browser may follow."""

    store: Store
    hall: Hall
    foreman: Foreman
    key: str = ""
    python_graders: bool = False
    most_file_bytes: int = MOST_FILE_BYTES


@contextmanager
def opened_desk(shop: Shop, hall: Hall, screen: Screen, *, key: str = "") -> Iterator[Desk]:
    """The desk over a shop's jobs, whose finished ones are served from now on. Raises FolderError."""
    store = open_store(shop.folder)
    with closing(store.db):
        sweep(store)
        for job in list_jobs(store, ("succeeded",)):
            try:
                asyncio.run(hall.add(store.run(job.id), job.model))
            except TunesmithError as error:
                screen.warn(f"{job.model} is not served: {error}")
        foreman = Foreman(store, hall, shop.at_once)
        yield Desk(store=store, hall=hall, foreman=foreman, key=key, python_graders=shop.python_graders)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder of jobs, for this server alone. Raises FolderError that names the process which has it."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(RunFolder(path=folder)):
        yield


def tuning_routers(desk: Desk) -> Sequence[APIRouter]:
    """The routes, to be given to `server_app`."""
    return (_files(desk), _jobs(desk), _changes(desk), _pages(desk))


def _files(desk: Desk) -> APIRouter:
    router, store = APIRouter(), desk.store

    @router.post(FILES)
    async def upload(request: Request, token: Token = None) -> Mapping[str, Any]:
        return file_object(await take_upload(request, store, desk.most_file_bytes, token))

    @router.get(FILES)
    def listed(
        purpose: Annotated[str | None, Query(max_length=64)] = None,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        order: Literal["asc", "desc"] = "desc",
    ) -> Mapping[str, Any]:
        found = [file for file in list_files(store) if purpose in (None, file.purpose)]
        return _page([file_object(file) for file in (found if order == "asc" else found[::-1])], after, limit)

    @router.get(FILES + "/{file_id}")
    def retrieve(file_id: str) -> Mapping[str, Any]:
        return file_object(find_file(store, file_id))

    @router.get(FILES + "/{file_id}/content")
    def content(file_id: str) -> FileResponse:
        file = find_file(store, file_id)
        return FileResponse(path_of(store, file.id), filename=file.name, media_type="application/octet-stream")

    @router.delete(FILES + "/{file_id}")
    def delete(file_id: str) -> Mapping[str, Any]:
        delete_file(store, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


def _jobs(desk: Desk) -> APIRouter:
    router, store = APIRouter(), desk.store

    @router.post(JOBS)
    async def create(body: JobBody, token: Token = None) -> Mapping[str, Any]:
        job = _created(desk, body, token)
        desk.foreman.look()
        return job_object(store, desk.key, job)

    @router.get(JOBS)
    def listed(request: Request, after: After = None, limit: Limit = 20) -> Mapping[str, Any]:
        wanted = _wanted_metadata(request)
        found = [job for job in list_jobs(store)[::-1] if _has_metadata(job, wanted)]
        return _page([job_object(store, desk.key, job) for job in found], after, limit)

    @router.get(JOBS + "/{job_id}")
    def retrieve(job_id: str) -> Mapping[str, Any]:
        return job_object(store, desk.key, find_job(store, job_id))

    @router.get(JOBS + "/{job_id}/events")
    def events(job_id: str, after: After = None, limit: Limit = 20) -> Mapping[str, Any]:
        found = list_events(store, find_job(store, job_id).id)
        return _page([event_object(job_id, event) for event in found], after, limit)

    @router.get(JOBS + "/{job_id}/checkpoints")
    def checkpoints(job_id: str, after: After = None, limit: Limit = 10) -> Mapping[str, Any]:
        job = find_job(store, job_id)
        return _page([checkpoint_object(store, job)] if job.status == "succeeded" else [], after, limit)

    return router


def _changes(desk: Desk) -> APIRouter:
    router, store = APIRouter(), desk.store

    def change(name: str, before: Sequence[Status], after: Status, message: str) -> Mapping[str, Any]:
        job = find_job(store, name)
        if job.status != after and not move(store, name, before, after, message):
            raise _unfit(store, name, before)
        desk.foreman.stop(name)
        desk.foreman.look()
        return job_object(store, desk.key, find_job(store, name))

    @router.post(JOBS + "/{job_id}/cancel")
    async def cancel(job_id: str) -> Mapping[str, Any]:
        before: tuple[Status, ...] = ("validating_files", "queued", "running", "paused")
        return change(job_id, before, "cancelled", "The job has been cancelled")

    @router.post(JOBS + "/{job_id}/pause")
    async def pause(job_id: str) -> Mapping[str, Any]:
        return change(job_id, ("queued", "running"), "paused", "Fine-tuning job paused")

    @router.post(JOBS + "/{job_id}/resume")
    async def resume(job_id: str) -> Mapping[str, Any]:
        job = find_job(store, job_id)
        if job.error and job.error["code"] == INVALID_FILE:
            raise Problem(400, "the job's rows stay as they are; create another", param="fine_tuning_job_id")
        if job.status not in ("queued", "running") and not queue_again(store, job_id):
            raise _unfit(store, job_id, ("paused", "failed"))
        desk.foreman.look()
        return job_object(store, desk.key, find_job(store, job_id))

    return router


def _pages(desk: Desk) -> APIRouter:
    router, store = APIRouter(include_in_schema=False), desk.store
    page = PAGE.read_text(encoding="utf-8")
    policy = content_policy(page)

    @router.get(PAGE_PATH)
    def front() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @router.get(PAGE_PATH + "/{job_id}/report")
    def report(job_id: str) -> FileResponse:
        path = RunFolder(path=store.run(find_job(store, job_id).id)).report
        if not path.is_file():
            raise Problem(404, "the run has no report yet", param="job_id")
        return FileResponse(path, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})

    @router.get(JOBS + "/{job_id}/progress")
    def progress(job_id: str) -> Mapping[str, Any]:
        job = find_job(store, job_id)
        lines = read_jsonl(RunFolder(path=store.run(job.id)).metrics)
        log = store.job(job.id) / "log.txt"
        return {
            "loss": points(lines, "loss"),
            "valid_loss": points(lines, "valid_loss"),
            "reward": points(lines, "score"),
            "valid_reward": points(lines, "reward"),
            "total_steps": steps_of(store, job.id),
            "log": tail(log),
        }

    return router


def _created(desk: Desk, body: JobBody, token: str | None) -> Job:
    """A job with its folder, recipe and own copy of its rows. Raises Problem, RecipeError or FolderError."""
    store, hall = desk.store, desk.hall
    asked, name = order(body, python_graders=desk.python_graders), new_id("ftjob")
    if known := known_job(store, asked, token):
        return known
    if body.model != hall.base_name:
        what = f"this server fine-tunes {hall.base_name} and no other model"
        raise Problem(400, what, param="model", code="model_not_found")
    folder = store.job(name)
    named = {part: asked[f"{part}_file"] for part in ("training", "validation")}
    files = {part: _rows_file(store, file, f"{part}_file") for part, file in named.items() if file}
    if len({file.sha256 for file in files.values()}) < len(files):
        raise Problem(400, "the validation file holds the same rows as the training file", param="validation_file")
    paths = {part: folder / part / f"{_word(file.name)}.jsonl" for part, file in files.items()}
    base = str(Path(hall.source).absolute()) if Path(hall.source).exists() else hall.source
    width = int(hall.model.head_weight.shape[1])
    made = None
    try:
        with storage_errors(folder):
            for part, path in paths.items():
                path.parent.mkdir(parents=True)
                os.link(path_of(store, files[part].id), path)  # a deleted file stays with its jobs
        if grader := grader_of(asked):
            write_text(folder / GRADER_FILE, grader_file(grader))
        recipe = recipe_of(asked, base, width, paths["training"], paths.get("validation"), store.run(name))
        text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
        write_text(folder / "recipe.yaml", text)
        suffix = asked["suffix"] or ""
        made = add_job(store, name, asked, f"ft:{hall.base_name}:tunesmith:{suffix}:{name[-8:]}", token)
        return made
    finally:
        if made is None or made.id != name:  # refused, or made before under the same key
            shutil.rmtree(folder, ignore_errors=True)


def _rows_file(store: Store, name: str, param: str) -> File:
    file = find_file(store, name, param)
    if file.purpose != PURPOSE:
        raise Problem(400, f"{param}: the file's purpose is {file.purpose}", param=param)
    return file


def _word(name: str) -> str:
    """A client's file name as one that is safe here."""
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in name)
    return plain.removesuffix(".jsonl").lstrip(".")[:100] or "rows"


def _unfit(store: Store, name: str, before: Sequence[Status]) -> Problem:
    job = find_job(store, name)
    what = f"the job is {job.status}, and only one that is {', '.join(before)} can be changed so"
    return Problem(400, what, param="fine_tuning_job_id", code="job_status")


def _page(items: Sequence[Mapping[str, Any]], after: str | None, limit: int) -> Mapping[str, Any]:
    """A part of a list as OpenAI's clients page through it."""
    start = 0
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise Problem(400, "there is nothing of this id in the list", param="after")
        start = places[0] + 1
    part = items[start : start + limit]
    ends = {"first_id": part[0]["id"], "last_id": part[-1]["id"]} if part else {"first_id": None, "last_id": None}
    return {"object": "list", "data": list(part), "has_more": start + limit < len(items), **ends}


def _wanted_metadata(request: Request) -> Mapping[str, str]:
    found = {key[9:-1]: value for key, value in request.query_params.items() if key.startswith("metadata[")}
    return {key: value for key, value in found.items() if key}


def _has_metadata(job: Job, wanted: Mapping[str, str]) -> bool:
    given = job.asked["metadata"] or {}
    return all(given.get(key) == value for key, value in wanted.items())
