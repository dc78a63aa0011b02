"""The command line: one command, one short function. Imports of torch wait until a command needs them."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import __version__
from .errors import Interrupted, RecipeError, TunesmithError
from .recipe import Recipe, described_keys, known_keys, load_recipe
from .screen import Screen, terminal

INTERRUPTED = 130
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
RunPath = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set train.epochs=2")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print results.json on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def _importing() -> Iterator[None]:
    """Import without the garbage collector: it would look at a million new objects again and again, all in use."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@app.command()
def run(
    recipe: RecipePath, set_: Overrides = None, quiet: Quiet = False, json_: Json = False, debug: Debug = False
) -> None:
    """Do the whole job; the same command goes on after a stop."""
    resolved = load_recipe(recipe, tuple(set_ or ()))  # first, as its mistakes need not wait for torch
    with _importing():
        from .pipeline.run import run as run_recipe
        from .world import world_from_env

    world = world_from_env()
    screen = Screen(quiet=quiet or json_ or not world.leads)
    folder = run_recipe(resolved, world, screen=screen, root=recipe.parent)
    if world.leads:
        if json_:
            print(folder.results.read_text(encoding="utf-8"), end="")
        elif not quiet:
            _print_report(folder.path)


@app.command()
def distill(
    recipe: RecipePath,
    set_: Overrides = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask a teacher that may cost money without asking you.")
    ] = False,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Train a student to do without a long prompt: collect a teacher's answers, tune, and compare the two."""
    resolved = load_recipe(recipe, tuple(set_ or ()))
    with _importing():
        from .pipeline.distill import bill, plan_distillation
        from .pipeline.distill import distill as distill_recipe
        from .world import world_from_env

    world = world_from_env()
    screen = Screen(quiet=quiet or json_ or not world.leads)
    plan = plan_distillation(resolved, screen, recipe.parent)
    if world.leads and plan.requests and plan.costs_money and not yes:
        if not sys.stdin.isatty():
            what = f"{plan.requests:,} requests may cost money ({bill(plan)})"
            raise RecipeError(what, where="task.teacher", fix="If that is meant, add --yes.")
        typer.confirm(f"{bill(plan)}\nSend {plan.requests:,} requests?", abort=True, err=True)
    folder = distill_recipe(plan, world, screen)
    if world.leads:
        if json_:
            print(folder.results.read_text(encoding="utf-8"), end="")
        elif not quiet:
            _print_report(folder.path)


@app.command()
def check(
    recipe: RecipePath,
    set_: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows to show.")] = 4,
    debug: Debug = False,
) -> None:
    """Look at the data: what is kept and why, and which tokens are trained (green)."""
    resolved = load_recipe(recipe, tuple(set_ or ()))
    with _importing():
        from .data.show import masked_text
        from .model.load import load_vocabulary
        from .pipeline.forecast import trained_rows

    console = terminal()
    vocabulary = load_vocabulary(resolved.base)
    for note in vocabulary.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    examples, ledger = trained_rows(resolved, recipe.parent, vocabulary, Screen(console=console))
    for example in examples[:rows]:
        console.rule(
            f"row {example.id}: {int((example.weights > 0).sum())} of {len(example.tokens)} tokens trained", style="dim"
        )
        console.print(masked_text(example, vocabulary.tokenizer), soft_wrap=True)
    for entry in ledger[:rows]:
        console.print(f"{entry.action}: {entry.source}: {entry.reason} {entry.detail}", markup=False, highlight=False)
    if len(ledger) > rows:
        console.print(f"... and {len(ledger) - rows} more ledger entries", style="dim")


@app.command()
def plan(recipe: RecipePath, set_: Overrides = None, debug: Debug = False) -> None:
    """Predict memory, time and FLOPs, and the smallest gain the test rows can show; trains nothing."""
    resolved = load_recipe(recipe, tuple(set_ or ()))
    with _importing():
        from .pipeline.forecast import forecast
        from .world import world_from_env

    forecast(resolved, recipe.parent, world_from_env(), Screen(console=terminal()))


@app.command()
def evaluate(
    run_folder: RunPath,
    data: Annotated[str, typer.Option(help="Rows to answer, in any layout the recipe reads.")],
    update: Annotated[str, typer.Option(help="lora, full, economy or base.")] = "",
    debug: Debug = False,
) -> None:
    """Answer other rows with a run's model and grade them; prints JSON."""
    with _importing():
        from .pipeline.again import evaluate_again

    print(json.dumps(evaluate_again(run_folder, data, update, Screen()), indent=1))


@app.command()
def compare(first: RunPath, second: RunPath, debug: Debug = False) -> None:
    """Compare the tuned models of two runs on the test rows that both answered."""
    with _importing():
        from .pipeline.again import compare_runs

    Screen(console=terminal()).table(["metric", "first", "second", "first - second", "p"], compare_runs(first, second))


@app.command()
def export(
    run_folder: RunPath,
    to: Annotated[str, typer.Option(help="adapter, merged or gguf.", show_default=False)],
    type_: Annotated[str, typer.Option("--type", help="f32, f16, bf16, q8_0, q4_k_m, ...; the kind's own.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder; RUN/exports/<kind> unless given.")] = None,
    update: Annotated[str, typer.Option(help="lora, full or economy; the run's subject unless given.")] = "",
    rows: Annotated[int, typer.Option(min=1, help="Test rows to compare answers on.")] = 100,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Do not compare it with what was judged.")] = False,
    debug: Debug = False,
) -> None:
    """Hand the tuned model to other programs, after comparing it there with what was judged; 1 if it falls short."""
    with _importing():
        from .pipeline.export import Wanted, export, show_export

    wanted = Wanted(to=to, type=type_, out=out, update=update, rows=rows, checked=not unchecked)
    record = export(run_folder, wanted, Screen(console=terminal(stderr=True, soft_wrap=True)))
    show_export(record, Screen(console=terminal(soft_wrap=True)))
    if record["checked"] and not record["passed"]:
        raise typer.Exit(1)


@app.command(name="round")
def round_(
    base: Annotated[str, typer.Argument(help="What a recipe's base: takes.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    quiet: Quiet = False,
    json_: Annotated[bool, typer.Option("--json", help="Print rounded.json on standard output.")] = False,
    debug: Debug = False,
) -> None:
    """Write a base rounded to 8 bits a number, which is approximate; adapters then need a quarter of its memory."""
    with _importing():
        from .pipeline.rounding import round_base

    record = round_base(base, out, Screen(quiet=quiet or json_))
    if json_:
        print(json.dumps(record, indent=1))


@app.command()
def report(run_folder: RunPath, debug: Debug = False) -> None:
    """Write report.html again from the run folder and print the verdict."""
    with _importing():
        from .report.page import write_report

    write_report(run_folder)
    _print_report(run_folder)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A run folder or any base model.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Talk to a tuned model in the terminal; an empty line ends."""
    with _importing():
        from .pipeline.again import chat_with

    chat_with(model, terminal())


@app.command()
def label(
    recipe: RecipePath,
    pairs: Annotated[str, typer.Option(help="A file of prompts with answer_a and answer_b.")] = "",
    model: Annotated[list[str] | None, typer.Option(help="Draw answers from it; give two to compare them.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="How many prompts the models answer.")] = None,
    gold: Annotated[str, typer.Option(help="Pairs with a known better answer, to check attention.")] = "",
    repeats: Annotated[float, typer.Option(min=0, max=1, help="Share of pairs shown twice.")] = 0.1,
    per_pair: Annotated[int, typer.Option(min=0, help="Raters a pair needs; 0: everybody sees all.")] = 0,
    rater: Annotated[str, typer.Option(help="Your name; the page asks for it otherwise.")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 finds a free one.")] = 8765,
    out: Annotated[Path | None, typer.Option(help="Folder; labels/<recipe name> unless given.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write the choices as preference rows, then end.")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Print agreement and biases, then end.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Let people choose between two answers in a local page; the choices train `reward` and `dpo`."""
    with _importing():
        from .serve import label as labelling
        from .serve.turns import Sharing

    resolved, folder = load_recipe(recipe, tuple(set_ or ())), out or labelling.label_folder(recipe)
    if export:
        labelling.export(folder, export, Screen())
    elif summary or json_:
        found = labelling.summary(folder, resolved.evaluate.level, resolved.evaluate.seed)
        if json_:
            print(json.dumps(asdict(found), ensure_ascii=False, indent=1))
        else:
            labelling.show_summary(found, Screen(console=terminal()))
    else:
        source = labelling.Source(pairs=pairs, gold=gold, models=tuple(model or ()), prompts=prompts)
        labelling.gather(resolved, folder, source, Screen())
        sharing = Sharing(repeats=repeats, per_pair=per_pair)
        labelling.serve(folder, recipe.stem, Screen(), port=port, rater=rater, sharing=sharing)


@app.command()
def serve(
    model: Annotated[list[str], typer.Argument(help="Finished runs of one base, or one base.", show_default=False)],
    host: Annotated[str, typer.Option(help="Any other address than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 finds a free one.")] = 8000,
    key: Annotated[str, typer.Option(envvar="TUNESMITH_KEY", help="What clients send as their API key.")] = "",
    name: Annotated[list[str] | None, typer.Option(help="A host name by which clients call the server.")] = None,
    update: Annotated[str, typer.Option(help="lora, full or economy; the run's best unless given.")] = "",
    batch: Annotated[int, typer.Option(min=1, max=256, help="Answers drawn side by side.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Answers that may wait; more are refused with 429.")] = 256,
    context: Annotated[int, typer.Option(min=2, help="Most tokens of prompt and answer.")] = 4096,
    jobs: Annotated[Path | None, typer.Option(help="Take fine-tuning jobs, and keep them in this folder.")] = None,
    at_once: Annotated[int, typer.Option(min=1, max=64, help="Jobs worked on at a time, where memory allows.")] = 1,
    python_graders: Annotated[
        bool, typer.Option(help="Run Python that jobs bring, with this server's rights.")
    ] = False,
    engine: Annotated[
        Literal["auto", "own", "vllm"], typer.Option(help="auto: vLLM on a GPU where it is installed.")
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Answer over HTTP as OpenAI's API does: one base in memory, each run's adapter by its folder's name."""
    with _importing():
        from .serve import start
        from .serve.engine import Limits
        from .serve.tuning import Shop

    door = start.Door(host=host, port=port, key=key, names=tuple(name or ()))
    limits = Limits(rows=batch, waiting=queue, context_tokens=context)
    shop = Shop(folder=jobs.absolute(), at_once=at_once, python_graders=python_graders) if jobs else None
    start.serve(model, door, limits, Screen(), update=update, shop=shop, engine=engine)


@app.command()
def doctor(debug: Debug = False) -> None:
    """Say what this machine can do and whether everything that Tunesmith needs is here."""
    with _importing():
        from .pipeline.health import examine

    Screen(console=terminal()).table(["", "", ""], examine())


@app.command()
def schema(
    keys: Annotated[bool, typer.Option("--keys", help="Names only.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Keys, what they are unless given, what they mean.")] = False,
) -> None:
    """Print the recipe's JSON Schema, or its keys to read."""
    if table:
        Screen(console=terminal()).table(["key", "unless given", "meaning"], described_keys())
    else:
        print("\n".join(known_keys()) if keys else json.dumps(Recipe.model_json_schema(), indent=1))


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _version(wanted: bool) -> bool:
    if wanted:
        version()
        raise typer.Exit
    return wanted


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Fine-tune a language model on your own examples, and know whether it worked."""


def _bare_overrides(arguments: Sequence[str]) -> list[str]:
    """Words that look like key=value with a key of recipes, and are not what --set takes."""
    words = [word.lstrip("-") for before, word in pairwise(arguments) if before != "--set"]
    return [word for word in words if "=" in word and word.split("=")[0] in known_keys()]


def _print_report(run_folder: Path) -> None:
    """The verdict on the terminal; imported when there is one, as matplotlib comes with it."""
    with _importing():
        from .report.page import print_report

    print_report(run_folder, terminal())


def main() -> None:
    """Entry point: every expected error is one message and exit code 2, a stop that was asked for 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    errors = terminal(stderr=True, soft_wrap=True)
    try:
        app(prog_name="tunesmith")
    except TunesmithError as error:
        if "--debug" in sys.argv:
            raise
        stopped = isinstance(error, Interrupted)
        errors.print("[bold]stopped[/]" if stopped else "[bold red]error[/]", end=" ")
        errors.print(str(error).removeprefix("stopped "), markup=False, highlight=False)
        sys.exit(INTERRUPTED if stopped else 2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            errors.print("stopped; run the same command to go on")
        for override in _bare_overrides(sys.argv) if end.code == 2 else ():
            errors.print(f"A recipe's key is overridden with --set {override}", markup=False, highlight=False)
        raise
    except KeyboardInterrupt:  # before the command itself has begun
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
