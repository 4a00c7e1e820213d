"""`push_to_hub`: upload an adapter, a LoRA or an exported checkpoint to the Hugging Face hub.

1. Nothing is sent before the folder, the token and the offline mode are checked.
2. `HfApi.create_repo` makes the repository, private unless asked otherwise. A repository that holds
   files, or that is public where a private one was asked for, is refused.
3. One commit holds the files of the folder and the model card with what the user adds to it. Files
   of the folder that no export writes, such as logs, are not sent.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    is_offline_mode,
)

import cdt_lens
from cdt_lens.core.artifacts import tensor_file
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.display import few
from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.adapter import ADAPTER_FILE, Adapter
from cdt_lens.finetuning.export_base import BASE_README, LEGAL
from cdt_lens.finetuning.model_card import CARD_FILE, TAG, model_card, published

_LORA_CONFIG, _BASE_KEY = "adapter_config.json", "base_model_name_or_path"
# The endings of what transformers, peft and this package write, and the names with such an ending.
_ENDINGS = (".json", ".safetensors", ".model", ".txt", ".jinja")
_WRITTEN = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "adapter*.json", "adapter*.safetensors", "cdt_*.json", "cdt_*.safetensors",
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "chat_template*", "additional_chat_templates*",
)  # fmt: skip
_OF_THE_HUB = ".gitattributes"  # every new repository holds it


@checked_arguments
def push_to_hub(
    what: Adapter | str | Path, repo: str, *, private: bool = True, token: str | None = None,
    overwrite: bool = False, base_model: str | None = None, license: str | None = None,
    language: Sequence[str] = (), datasets: Sequence[str] = (),
) -> str:  # fmt: skip
    """Upload an adapter or an exported model, with its model card, as a repository of the hub.

    The card says what was trained on what, and the accuracies before and after. The files are those
    that `Adapter.save`, `export` or `to_peft` wrote. An adapter's file names the command that made
    it, and few-shot examples of the prompts are uploaded with the task.

    Args:
        what: An adapter, or a folder that `Adapter.save`, `export` or `to_peft` wrote.
        repo: Name of the repository, such as "name/javanese-sentiment". Without a namespace it is
            that of the user.
        private: Whether the repository is private. False makes a new one public.
        token: Access token of the hub. None takes the one of `hf auth login` or of the environment
            variable `HF_TOKEN`.
        overwrite: Whether to replace the files of a repository that holds some.
        base_model: Hub name of the base model. A LoRA whose base is a folder of this machine needs
            it.
        license: Licence for the card, such as that of the data: "cc-by-sa-4.0". None names none.
        language: Codes of the languages for the card, such as "jv".
        datasets: Hub names of the data sets for the card.

    Returns:
        The address of the repository.

    Raises:
        InputError: The folder was not written by this package, there is no token, the offline mode
            is on, the repository holds files, or the hub refuses the call.
        ArtifactError: The adapter's file is damaged.
    """
    given: dict[str, Any] = {
        "base_model": base_model, "license": license, "language": language, "datasets": datasets,
    }  # fmt: skip
    with _folder_of(what) as folder:
        contents = _contents(folder)
        if contents.needs_base and base_model is None:
            raise InputError(
                f"{folder}: its LoRA is for a base model in a folder of this machine; give "
                "base_model= (--base-model), the name of that model on the hub"
            )
        api = _api(token)
        with _told(repo):
            url = api.create_repo(repo, private=private, exist_ok=True)
            held = _held(api, url.repo_id, private, overwrite)
            _commit(api, url.repo_id, _uploads(contents, url.repo_id, given), held)
    return str(url)


# ---------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class _Contents:
    """The files of a folder that are uploaded, and its card."""

    card: ModelCard
    files: tuple[Path, ...]
    folder: Path
    needs_base: bool = False


@contextmanager
def _folder_of(what: Adapter | str | Path) -> Iterator[Path]:
    if not isinstance(what, Adapter):
        yield Path(what)
        return
    with tempfile.TemporaryDirectory() as folder:
        what.save(folder)
        yield Path(folder)


def _contents(folder: Path) -> _Contents:
    """Return what is uploaded of a folder.

    Raises:
        InputError: the folder was not written by this package.
        ArtifactError: its adapter is damaged.
    """
    if (folder / ADAPTER_FILE).is_file():
        adapter = Adapter.load(folder)
        card = model_card(adapter, adapter.provenance.model, "adapter")
        tensors = tensor_file(folder / ADAPTER_FILE)
        own = (folder / ADAPTER_FILE, *([] if tensors is None else [tensors]))
        return _Contents(card, own, folder)
    card_file = folder / CARD_FILE
    if not card_file.is_file() or TAG not in _read_card(card_file).data.get("tags", ()):
        raise InputError(
            f"{folder}: expected a folder of Adapter.save, export or to_peft of this version, with "
            f"{ADAPTER_FILE} or a {CARD_FILE} with the tag {TAG}; export the adapter again"
        )
    held = [p for p in sorted(folder.iterdir()) if p.is_file()]
    files = tuple(p for p in held if _is_ours(p.name))
    other = [p.name for p in held if p.name.endswith(_ENDINGS) and p not in files]
    if other:
        raise InputError(
            f"{folder}: {few(other, 4)}: no file that export writes, so it is not known "
            "whether it may be sent. Move it out of the folder"
        )
    lora = folder / _LORA_CONFIG
    needs_base = lora in files and _is_local(str(_json(lora).get(_BASE_KEY) or ""))
    return _Contents(_read_card(card_file), files, folder, needs_base)


def _is_ours(name: str) -> bool:
    """Return whether a file has the name of one that `export` or `to_peft` writes."""
    written = any(fnmatch(name, pattern) for pattern in _WRITTEN)
    return written or name.lower().startswith(LEGAL) or name == BASE_README


def _is_local(base: str) -> bool:
    return not base or Path(base).exists() or Path(base).is_absolute()


def _read_card(path: Path) -> ModelCard:
    try:
        return ModelCard.load(path)
    except Exception as error:  # the errors of YAML and of huggingface_hub have no common class
        raise InputError(f"{path}: its metadata cannot be read ({_line(error)})") from error


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8")))


def _uploads(contents: _Contents, repo: str, given: dict[str, Any]) -> dict[str, Path | bytes]:
    """Return what is uploaded, by name in the repository."""
    files: dict[str, Path | bytes] = {file.name: file for file in contents.files}
    if given["base_model"] is not None and _LORA_CONFIG in files:
        config = _json(contents.folder / _LORA_CONFIG) | {_BASE_KEY: given["base_model"]}
        files[_LORA_CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    card = published(contents.card, repo, **given)
    return files | {CARD_FILE: str(card).encode()}


# ---------------------------------------------------------------------- the hub


def _api(token: str | None) -> HfApi:
    """Return the hub's interface.

    Raises:
        InputError: the offline mode is on, or there is no token.
    """
    if is_offline_mode():
        raise InputError(
            "push_to_hub: the offline mode is on (HF_HUB_OFFLINE=1), so nothing is sent; unset the "
            "variable and start Python again"
        )
    token = token or get_token()
    if token is None:
        raise InputError(
            "push_to_hub: no access token; run hf auth login, set HF_TOKEN, or pass token="
        )
    return HfApi(token=token, library_name="cdt_lens", library_version=cdt_lens.__version__)


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Raise the errors of the hub as `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # those of HTTP, of names and of metadata have no common class
        raise InputError(f"{repo}: the upload failed ({_line(error)})") from error


def _held(api: HfApi, repo: str, private: bool, overwrite: bool) -> list[str]:
    """Return the files of a repository that are to be replaced.

    Raises:
        InputError: the repository is public where a private one was asked for, or holds files that
            are not to be replaced.
    """
    info = api.model_info(repo)
    if private and not info.private:
        raise InputError(
            f"{repo}: exists and is public; pass private=False (--public) to upload to it, or name "
            "another repository"
        )
    held = [file.rfilename for file in info.siblings or () if file.rfilename != _OF_THE_HUB]
    if held and not overwrite:
        raise InputError(
            f"{repo}: exists and holds {few(held, 3)}; pass overwrite=True to "
            "replace its files, or name another repository"
        )
    return held


def _commit(api: HfApi, repo: str, files: dict[str, Path | bytes], held: list[str]) -> None:
    operations: list[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
    operations += [CommitOperationDelete(name) for name in held if name not in files]
    api.create_commit(repo, operations, commit_message="Upload of cdt_lens")


def _line(error: Exception) -> str:
    """Return an error and what caused it in one line."""
    chain = [error, *([] if error.__cause__ is None else [error.__cause__])]
    lines = [f"{type(e).__name__}: {' '.join(str(e).split())[:300]}" for e in chain]
    return "; ".join(dict.fromkeys(lines))
