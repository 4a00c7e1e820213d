"""Kept results: used again under an equal key of the same version, else made again with a reason."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import assert_same_bits
from typing_extensions import TypedDict

import cdt_lens
from cdt_lens.core.artifacts import load_artifact, save_artifact
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.core.kept import Kept, difference, drop_other_versions, file_name, key_of, reuse

NOW = cdt_lens.__version__
MADE_FROM = {"model": "abc", "heads": ("L0H1",), "seed": 0}


def kept(folder: Path, **changes: Any) -> Kept:
    return Kept(folder / "kept.json", "cdt_lens.test", {**MADE_FROM, **changes})


def upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cdt_lens, "__version__", "99.0")


def test_values_and_tensors_come_back(tmp_path: Path):
    assert kept(tmp_path).reuse(print) is None and kept(tmp_path).read() is None
    rows = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    kept(tmp_path).write({"index": [3, 1]}, {"rows": rows})
    assert kept(tmp_path).reuse(pytest.fail)["index"] == [3, 1]  # type: ignore[index]
    body, tensors = kept(tmp_path).read()  # type: ignore[misc]
    assert body["index"] == [3, 1]
    assert_same_bits(tensors["rows"], rows)
    kept(tmp_path).remove()
    assert list(tmp_path.iterdir()) == []


def test_every_key_holds_the_version(tmp_path: Path):
    kept(tmp_path).keep({})
    body, _ = load_artifact(tmp_path / "kept.json", format="cdt_lens.test", version=1)
    assert body["key"] == {"model": "abc", "heads": ["L0H1"], "seed": 0, "version": NOW}


@pytest.mark.parametrize(
    ("change", "names"),
    [({"seed": 1}, "seed"), ({"heads": [], "model": "b"}, "heads, model"), ({"new": 1}, "new")],
)
def test_under_another_key_it_is_made_again_or_refused(tmp_path: Path, change, names):
    kept(tmp_path).keep({"n": 1})
    said: list[str] = []
    assert kept(tmp_path, **change).reuse(said.append) is None
    path = tmp_path / "kept.json"
    assert said == [f"{path} was made with other settings or data ({names}); making it again"]
    with pytest.raises(InputError, match=rf"another run, .*\({names}\); remove it") as caught:
        kept(tmp_path, **change).read()
    assert str(path) in str(caught.value)
    assert kept(tmp_path).reuse(pytest.fail) is not None


def test_after_an_upgrade_it_is_made_again_or_refused(tmp_path: Path, monkeypatch):
    kept(tmp_path).keep({"n": 1})
    upgrade(monkeypatch)
    said: list[str] = []
    assert kept(tmp_path).reuse(said.append) is None
    assert f"made with cdt_lens {NOW} (this is 99.0); making it again" in said[0]
    with pytest.raises(InputError, match=r"made with cdt_lens .* \(this is 99.0\); remove it"):
        kept(tmp_path).read()
    kept(tmp_path).drop_stale(said.append)
    assert said[1].endswith("(this is 99.0); removed") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [None, {"model": "abc", "heads": ["L0H1"], "seed": 0}, "a hash"])
def test_a_key_without_a_version_is_of_an_earlier_one(old: object):
    assert f"an earlier cdt_lens (this is {NOW})" in str(difference(old, key_of(MADE_FROM)))


def test_what_is_not_stale_stays(tmp_path: Path):
    kept(tmp_path).keep({"n": 1})
    kept(tmp_path).drop_stale(pytest.fail)
    drop_other_versions([tmp_path / "kept.json"], "cdt_lens.test", pytest.fail)
    assert kept(tmp_path).reuse(pytest.fail) is not None


def test_checkpoints_of_other_versions_are_removed_with_a_word(tmp_path: Path, monkeypatch):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    Kept(old, "cdt_lens.test", {"a": 1}).write({}, {"rows": torch.ones(2)})
    before = tmp_path / "before.json"
    save_artifact(before, {"key": "a hash"}, format="cdt_lens.test", version=1)
    upgrade(monkeypatch)
    Kept(new, "cdt_lens.test", {"a": 2}).write({})
    said: list[str] = []
    drop_other_versions([old, new, before], "cdt_lens.test", said.append)
    assert list(tmp_path.iterdir()) == [new]
    assert [str(old) in said[0], str(before) in said[1]] == [True, True]


def test_a_damaged_file_is_made_again_and_a_damaged_checkpoint_refused(tmp_path: Path):
    kept(tmp_path).keep({"n": 1})
    path = tmp_path / "kept.json"
    path.write_text(path.read_text("utf-8")[:20], "utf-8")
    said: list[str] = []
    assert kept(tmp_path).reuse(said.append) is None
    assert "damaged" in said[0] and said[0].endswith("making it again")
    with pytest.raises(ArtifactError, match=f"{path}: damaged: .*, or remove {path}"):
        kept(tmp_path).read()
    assert path.exists()


def test_a_run_directory_removes_its_damaged_checkpoints_with_the_reason(tmp_path: Path):
    """A sweep's and a training's alike: nobody can read them, and the work is made again."""
    said: list[str] = []
    for drop in (
        lambda path: drop_other_versions([path], "cdt_lens.test", said.append),
        lambda path: kept(tmp_path).drop_stale(said.append),
    ):
        kept(tmp_path).keep({"n": 1})
        path = tmp_path / "kept.json"
        path.write_text(path.read_text("utf-8")[:20], "utf-8")
        drop(path)
        assert said.pop().startswith(f"{path}: damaged") and not path.exists()


class Counted(TypedDict):
    n: int


def test_values_of_another_type_are_made_again(tmp_path: Path):
    """Also where the checksum is right: the types are checked once, on reading."""
    typed = Kept(tmp_path / "kept.json", "cdt_lens.test", MADE_FROM, holds=Counted)
    typed.keep({"n": 1})
    assert typed.reuse(pytest.fail) is not None
    for wrong in ({"n": "1"}, {"n": True}, {}):
        typed.keep(wrong)
        said: list[str] = []
        assert typed.reuse(said.append) is None
        assert "kept.json: damaged: n: " in said[0] and said[0].endswith("making it again")


@pytest.mark.parametrize("harm", ["flip", "delete", "add", "remove the folder"])
def test_a_folder_beside_the_values_is_recorded_with_its_checksums(tmp_path: Path, harm: str):
    folder = tmp_path / "made"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(100))
    (folder / "deep" / "text").write_text("text")
    both = Kept(tmp_path / "kept.json", "cdt_lens.test", MADE_FROM, beside=folder)
    both.keep({"n": 1})
    (folder / ".DS_Store").write_text("a note of a file manager")
    assert both.reuse(pytest.fail) is not None
    if harm == "flip":
        (folder / "weights").write_bytes(bytes(50) + b"\x01" + bytes(49))
    elif harm == "delete":
        (folder / "deep" / "text").unlink()
    elif harm == "add":
        (folder / "adapter_config.json").write_text("{}")
    else:
        shutil.rmtree(folder)
    said: list[str] = []
    assert both.reuse(said.append) is None
    name = {"flip": "weights", "add": "adapter_config.json"}.get(harm, "deep/text")
    assert said[0].startswith(f"{folder / name} is ") and said[0].endswith("; making it again")


def test_a_result_with_a_key_of_its_own_is_kept_as_well(tmp_path: Path):
    path = tmp_path / "text"
    path.write_text("old")

    def load(source: Path) -> str:
        return source.read_text()

    own = {"old": key_of({"a": 1})}
    assert reuse(path, load, own.get, {"a": 1}, pytest.fail) == "old"
    said: list[str] = []
    assert reuse(path, load, own.get, {"a": 2}, said.append) is None and len(said) == 1
    assert reuse(tmp_path / "none", load, own.get, {"a": 1}, pytest.fail) is None


def test_names_for_files():
    for plain in ("javanese", "0.3", "zh-Hant_TW", "jäv"):
        assert file_name(plain) == plain
    texts = ["my lang", "my/lang", "my_lang", "my:lang", "", ".", "..", "../up", "a\0b", "x" * 500]
    texts += ["x" * 501, "ja\u0308v", "\ud800", " my lang"]
    names = [file_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    for name in names:
        assert re.fullmatch(r"[\w.-]{1,120}", name) and name.strip(".")
