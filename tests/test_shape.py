"""The shape of the code: sizes, import layers, what is never called, and what starts without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith
from tunesmith import recipe as recipes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tunesmith"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION, MOST_KEYS_OF_A_SPEC = 400, 60, 12

FORBIDDEN = {
    r"\b(import|from) (c?pickle|dill|cloudpickle|joblib|marshal|shelve)\b": "pickle",
    r"\btorch\s*\.\s*(load|save)\s*\(": "torch.load and torch.save",
    r"(?<![\w.])(exec|eval)\s*\(": "exec and eval",
    r"shell\s*=\s*True": "shell=True",
    r"\bos\.(system|popen)\s*\(": "a shell",
    r"\byaml\.(load|full_load|unsafe_load)(_all)?\s*\(": "yaml.load",
    r"trust_remote_code\s*=\s*True": "code from a model's repository",
    r"allow_pickle\s*=\s*True|weights_only\s*=\s*False": "pickle",
}

# `name` (`file.py`), `name` in `file.py` and `name`, `file.py`, perhaps of several names.
NAMED = re.compile(r"(`\w+`(?:(?:, | and | or )`\w+`)*)(?: \(| in |, )`([\w/]+\.py)`")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def code_of(path: Path) -> str:
    """The source without comments and strings, whose words do no harm."""
    code, after_a_name = "", False
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in (tokenize.COMMENT, tokenize.STRING, tokenize.ENCODING):
                is_name = token.type == tokenize.NAME
                code += (" " if is_name and after_a_name else "") + token.string
                after_a_name = is_name
    return code


def defined_in(path: Path) -> set[str]:
    """The functions, classes and values of a module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after running `code`."""
    script = (
        f"import sys\nsys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}\nprint(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split("\n")[-2].split())


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_A_FILE


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    lines = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions(path)}
    assert {name: count for name, count in lines.items() if count > MOST_LINES_OF_A_FUNCTION} == {}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stat().st_size], ids=name_of)
def test_a_file_says_why_it_exists(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_dangerous_is_called(path: Path) -> None:
    code = code_of(path)
    assert [why for pattern, why in FORBIDDEN.items() if re.search(pattern, code)] == []


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from dill import loads", "torch.load(f)", "eval(x)", "run(x, shell=True)", "os.system(x)"),
        *("yaml.load(f)", "f(trust_remote_code=True)", "np.load(f, allow_pickle=True)"),
    ],
)
def test_the_gate_sees_each_dangerous_call(line: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(f"{line}\n")
    code = code_of(tmp_path / "bad.py")
    assert [why for pattern, why in FORBIDDEN.items() if re.search(pattern, code)]


@pytest.mark.parametrize(
    "line", ["model.eval()", "yaml.safe_load(f)", "# eval(x)", "'torch.load(x)'", "f(trust_remote_code=False)"]
)
def test_the_gate_lets_harmless_lines_pass(line: str, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(f"{line}\n")
    code = code_of(tmp_path / "good.py")
    assert [why for pattern, why in FORBIDDEN.items() if re.search(pattern, code)] == []


def test_a_recipe_spec_has_few_keys() -> None:
    specs = [value for value in vars(recipes).values() if isinstance(value, type) and issubclass(value, recipes.Spec)]
    assert {
        spec.__name__: len(spec.model_fields) for spec in specs if len(spec.model_fields) > MOST_KEYS_OF_A_SPEC
    } == {}


def test_imports_point_one_way() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import tunesmith.folder, tunesmith.recipe, tunesmith.types, tunesmith.errors",
        "import pkgutil, importlib, tunesmith.report as r\n"
        "for m in pkgutil.walk_packages(r.__path__, 'tunesmith.report.'): importlib.import_module(m.name)",
    ],
    ids=["nouns", "report"],
)
def test_what_only_reads_starts_without_torch(code: str) -> None:
    assert loaded_by(code) & {"torch", "transformers", "datasets"} == set()


def test_help_starts_without_torch() -> None:
    code = "sys.argv = ['tunesmith', '--help']\nfrom tunesmith.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert loaded_by(code) & {"torch", "transformers", "datasets", "matplotlib"} == set()


def test_the_first_step_does_not_wait_for_what_only_the_last_page_needs() -> None:
    code = "import tunesmith.pipeline.run, tunesmith.world"
    assert loaded_by(code) & {"scipy.stats", "matplotlib", "tunesmith.report.page"} == set()


def test_what_the_tour_names_is_in_the_file_where_it_says() -> None:
    text = " ".join((ROOT / "docs" / "tour.md").read_text(encoding="utf-8").split())
    told = [(name, file) for names, file in NAMED.findall(text) for name in re.findall(r"`(\w+)`", names)]
    assert len(told) > 50  # else the tour is written another way, and nothing is looked at
    homes = {file: ROOT / file if file.startswith("tests/") else PACKAGE / file for _, file in told}
    assert [f"{name} in {file}" for name, file in told if name not in defined_in(homes[file])] == []


def test_the_map_has_every_module_and_every_page() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", text[text.index("## 4.") : text.index("## 5.")]))
    files = [path for path in [*SOURCES, *(ROOT / "docs").glob("*.md")] if path.stem != "__init__"]
    assert [name_of(path) for path in files if path.stem not in words] == []


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_a_shipped_recipe_parses(path: Path) -> None:
    assert recipes.load_recipe(path).out == f"runs/{path.stem}"


def test_the_version_is_the_same_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{tunesmith.__version__}"' in project
    assert f"## {tunesmith.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
