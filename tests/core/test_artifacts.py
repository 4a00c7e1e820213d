"""Proof (k), on the files themselves: whole or refused, never a silent mixture."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.checks import assert_same_bits
from torch import Tensor

from cdt_lens.core.artifacts import (
    atomic_write,
    content_hash,
    file_hash,
    load_artifact,
    new_folder,
    remove_artifact,
    save_artifact,
)
from cdt_lens.core.errors import ArtifactError, InputError

BODY = {"name": "é", "values": [1, 2.5, None, True], "nested": {"b": 1e-30, "a": -0.1}}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 4, generator=generator)
    values[0, 0] = torch.nan
    return {
        "values": values,
        "transposed": torch.randn(3, 4, generator=generator, dtype=torch.float64).T,
        "half": values.to(torch.bfloat16),
        "empty": torch.zeros(0, 2),
    }


def save(path: Path, seed: int = 0, body: dict[str, Any] | None = None) -> Path:
    return save_artifact(path, body or BODY, format="test", version=2, tensors=tensors(seed))


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return load_artifact(path, format="test", version=2)


def assert_holds(path: Path, seed: int) -> None:
    body, found = load(path)
    assert {key: body[key] for key in BODY} == BODY
    for name, expected in tensors(seed).items():
        assert_same_bits(found[name], expected)


def test_round_trip_is_bit_equal(tmp_path: Path):
    path = save(tmp_path / "new folder" / "a.json")
    assert_holds(path, 0)
    assert sorted(found.suffix for found in path.parent.iterdir()) == [".json", ".safetensors"]


def test_without_tensors_there_is_one_file(tmp_path: Path):
    path = save_artifact(tmp_path / "a.json", BODY, format="test", version=2)
    assert load(path)[1] == {}
    assert list(tmp_path.iterdir()) == [path]


def test_saving_again_replaces(tmp_path: Path):
    save(tmp_path / "a.json", seed=1)
    assert_holds(save(tmp_path / "a.json", seed=2), 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [("a.1", "a.2"), ("en.circuit", "en.scores"), ("qwen2.5-en", "qwen2.5-jv"), ("a", "a.json")],
)
def test_two_names_never_share_a_tensor_file(tmp_path: Path, one: str, other: str):
    save(tmp_path / one, seed=1)
    save(tmp_path / other, seed=2)
    assert_holds(tmp_path / one, 1)
    assert_holds(tmp_path / other, 2)


def test_a_name_that_ends_like_the_tensors_still_works(tmp_path: Path):
    assert_holds(save(tmp_path / "a.safetensors", seed=1), 1)


@pytest.mark.parametrize("key", [{10: "a", 9: "b"}, {"pair": (1, 2)}, {"long": [0.1 + 0.2, 1e300]}])
def test_what_is_saved_can_be_loaded(tmp_path: Path, key: dict[Any, Any]):
    path = save(tmp_path / "a.json", body={**BODY, "extra": key})
    assert load(path)[0]["extra"] == json.loads(json.dumps(key))


# Damage --------------------------------------------------------------------------------------------


def test_truncated_json_is_refused_with_its_path(tmp_path: Path):
    path = save(tmp_path / "a.json")
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_no_changed_byte_goes_unseen(tmp_path: Path):
    """Each byte of the JSON in turn: refused with the path, or (white space) it changes nothing."""
    path = save(tmp_path / "a.json")
    whole, before = path.read_bytes(), load(path)[0]
    for index in range(len(whole)):
        for flip in (0x01, 0x80):
            path.write_bytes(whole[:index] + bytes([whole[index] ^ flip]) + whole[index + 1 :])
            try:
                assert load(path)[0] == before
            except ArtifactError as error:
                assert str(path) in str(error)


def test_no_changed_byte_of_the_tensors_goes_unseen(tmp_path: Path):
    path = save(tmp_path / "a.json")
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for index in range(0, len(whole), 7):
        file.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(ArtifactError) as caught:
            load(path)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("length", [0, 5, 100])
def test_truncated_tensors_are_refused_with_their_path(tmp_path: Path, length: int):
    path = save(tmp_path / "a.json")
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert str(file) in str(caught.value)


def test_missing_tensors_are_refused_with_the_path(tmp_path: Path):
    path = save(tmp_path / "a.json")
    (file,) = tmp_path.glob("*.safetensors")
    file.unlink()
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert file.name in str(caught.value)


def test_another_format_is_refused(tmp_path: Path):
    path = save(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match="expected a other file, got 'test'") as caught:
        load_artifact(path, format="other", version=2)
    assert str(path) in str(caught.value)


def test_a_version_of_the_future_is_refused_and_an_older_one_read(tmp_path: Path):
    path = save(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match="version 2.*up to 1; update") as caught:
        load_artifact(path, format="test", version=1)
    assert str(path) in str(caught.value)
    load_artifact(path, format="test", version=3)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"test"', "{}", '{"format": "test"}'])
def test_json_of_something_else_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_no_file_is_a_persons_mistake(tmp_path: Path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_tensors_outside_the_folder_are_never_read(tmp_path: Path):
    path = save(tmp_path / "inside" / "a.json")
    (file,) = path.parent.glob("*.safetensors")
    file.rename(tmp_path / file.name)
    document = json.loads(path.read_text())
    document["tensors"]["file"] = f"../{file.name}"
    document.pop("sha256")
    document["sha256"] = content_hash(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="missing"):
        load(path)


# Writing that fails --------------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """`os.<name>` raises "no space left" at that call (from 1) and at every later one."""
    true, calls = getattr(os, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_artefact_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
):
    path = save(tmp_path / "a.json", seed=1)
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        fail_at(patched, name, call)
        with pytest.raises(InputError, match="No space left on device") as caught:
            save(path, seed=2)
    assert str(tmp_path) in str(caught.value)
    assert_holds(path, 1)
    assert sorted(tmp_path.iterdir()) == before  # no temporary file stays behind


def test_a_kill_between_the_two_files_is_never_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    path = save(tmp_path / "a.json", seed=1)
    true, calls = os.replace, []

    def killed_at_the_second(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        true(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed_at_the_second)
        with pytest.raises(Killed):
            save(path, seed=2)
    try:
        assert_holds(path, 1)
    except ArtifactError as error:
        assert str(tmp_path) in str(error)


def test_a_place_that_cannot_be_written_is_a_persons_mistake(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "a.json", tmp_path):
        with pytest.raises(InputError, match="cannot be written") as caught:
            atomic_write(path, "text")
        assert str(path) in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_folder_leaves_the_old_file(tmp_path: Path):
    path = save(tmp_path / "a.json", seed=1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot be written"):
            save(path, seed=2)
        assert_holds(path, 1)
    finally:
        tmp_path.chmod(0o700)


def test_bytes_and_text_are_written_as_they_are(tmp_path: Path):
    assert atomic_write(tmp_path / "t", "é\n").read_bytes() == "é\n".encode()
    payload = bytes(range(256))
    assert atomic_write(str(tmp_path / "b"), payload).read_bytes() == payload


# Hashes --------------------------------------------------------------------------------------------


def test_content_hash_knows_content_not_order():
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash((1, 2)) == content_hash([1, 2])
    different = [
        {},
        {"a": 1},
        {"a": 2},
        {"a": "1"},
        {"a": [1]},
        {"a": None},
        {"b": 1},
        [1, 2],
        [2, 1],
    ]
    assert len({content_hash(value) for value in different}) == len(different)


def test_file_hash_is_sha256(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hash(tmp_path / "a") == known


# Modes ---------------------------------------------------------------------------------------------


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Permission bits of every file and folder below `folder`, and of itself."""
    return {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027, 0o000])
def test_files_get_their_modes_from_the_umask(tmp_path: Path, mask: int):
    """As a file that `open` makes: the kernel's answer, not ours."""
    with umask(mask):
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "file").write_text("made by Python")
        expected = modes(tmp_path / "plain")
        save(tmp_path / "new" / "a.json", seed=1)
        save(tmp_path / "new" / "a.json", seed=2)
        atomic_write(tmp_path / "new" / "t.txt", "text")
        with new_folder(tmp_path / "new" / "model") as made:
            safetensors.torch.save_file({"a": torch.ones(2)}, made / "weights.safetensors")
            (made / "deep").mkdir()
            (made / "deep" / "b.json").write_text("{}")
            (made / "private").write_text("a library made this readable by its owner alone")
            (made / "private").chmod(0o600)
    found = modes(tmp_path / "new")
    assert {found.pop(name) for name in ("new", "model", "deep")} == {expected["plain"]}
    assert len(found) == 6 and set(found.values()) == {expected["file"]}


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as made:
        (made / "file").write_text("text")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "a") as made:
        assert not (tmp_path / "a").exists()
        (made / "file").write_text("text")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]
    with pytest.raises(InputError, match="a: cannot be written"), new_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "file").read_text() == "text"


@pytest.mark.parametrize("again", ["saved", "removed"])
def test_a_copy_keeps_its_tensors(again, tmp_path):
    path, copy = tmp_path / "a.json", tmp_path / "before.json"
    save_artifact(path, {}, format="x", version=1, tensors={"t": torch.ones(2)})
    copy.write_bytes(path.read_bytes())
    if again == "saved":
        save_artifact(path, {}, format="x", version=1, tensors={"t": torch.zeros(2)})
    else:
        remove_artifact(path)
    assert load_artifact(copy, format="x", version=1)[1]["t"].tolist() == [1, 1]
    remove_artifact(path)
    copy.unlink()
    save_artifact(path, {}, format="x", version=1, tensors={"t": torch.full((2,), 2.0)})
    save_artifact(path, {}, format="x", version=1, tensors={"t": torch.full((2,), 3.0)})
    assert load_artifact(path, format="x", version=1)[1]["t"].tolist() == [3, 3]


@pytest.mark.parametrize("given", [".", "link"])
def test_the_present_folder_and_a_link_can_be_filled(given, tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    monkeypatch.chdir(target if given == "." else tmp_path)
    with new_folder(given) as folder:
        (folder / "file").write_text("text")
    assert (target / "file").read_text() == "text"
