"""The numbers of the tiny models stay what `snapshot.json` records.

A change that alters a number on purpose records them again, from the repository's folder:
`PYTHONPATH=.:tests python -m helpers.snapshot tests/snapshot.json --case gpt2-hooked --case
qwen3-bridge --case gemma3-bridge` (with transformer-lens 3, which still has HookedTransformer).
The three cases have LayerNorm and a fused QKV with biases; RMSNorm, rotary positions, grouped keys
and a norm on q and k; post-norms and sliding windows; and both classes of TransformerLens.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
from helpers.places import TESTS
from helpers.snapshot import record
from helpers.wrapped import needs_hooked

# Another processor sums in another order. Without its vector instructions (ATEN_CPU_CAPABILITY and
# MKL_CBWR) float64 computations differed by 1e-14 of a value and training in float32 by 2e-6.
# `evaluate` reads its logits in float32.
TOLERANCES = {"finetune": 1e-4, "evaluate": 1e-6, "prior": 1e-6}
TOLERANCE = 1e-9
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?|-?\d+e[-+]?\d+")
LONGEST = 400  # of a recorded text, which is cut there


@cache
def recorded() -> dict[str, dict[str, Any]]:
    return json.loads((TESTS / "snapshot.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        pytest.param("gpt2", "hooked", marks=needs_hooked),
        ("qwen3", "bridge"),
        ("gemma3", "bridge"),
    ],
)
def test_every_number_is_as_recorded(family: str, backend: str):
    found = record([(family, backend)])
    expected = {k: v for k, v in recorded().items() if k.startswith(f"{family}-{backend} ")}
    assert len(expected) > 100
    assert found.keys() == expected.keys()
    different = [
        f"{name}: {found[name]} instead of {entry}"
        for name, entry in expected.items()
        if not alike(found[name], entry, tolerance_of(name))
    ]
    assert not different, "\n".join([f"{len(different)} differ", *different[:20]])


def tolerance_of(name: str) -> float:
    computation = name.split(" | ")[1].split()[0]
    return TOLERANCES.get(computation, TOLERANCE)


def alike(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> bool:
    """Whether shapes and words are equal and numbers of about size 1 within the tolerance."""
    if "text" in expected:
        words, numbers = split(expected["text"])
        own_words, own_numbers = split(found.get("text", ""))
        if len(expected["text"]) >= LONGEST:
            # A number with fewer digits moves the place where the text is cut.
            both = min(len(numbers), len(own_numbers))
            numbers, own_numbers = numbers[:both], own_numbers[:both]
            words, own_words = (text.split("#")[: both + 1] for text in (words, own_words))
            words, own_words = words[:-1], own_words[:-1]
    else:
        words, numbers = expected["shape"], expected["values"]
        own_words, own_numbers = found.get("shape"), found.get("values", [])
    size = max([1.0, *map(abs, numbers)])
    return (
        own_words == words
        and len(own_numbers) == len(numbers)
        and all(abs(a - b) <= tolerance * size for a, b in zip(own_numbers, numbers, strict=True))
    )


def split(text: str) -> tuple[str, list[float]]:
    """A text without its decimal numbers, and the numbers; of a cut text, without its last item."""
    whole = text if len(text) < LONGEST else text[: text.rindex(",")]
    return NUMBER.sub("#", whole), [float(number) for number in NUMBER.findall(whole)]


def test_the_comparison_sees_a_difference():
    """In a value, a shape, a word, a number of a text; and none below the tolerance."""
    tensor = {"shape": [2], "values": [0.5, 3.0]}
    assert alike({"shape": [2], "values": [0.5, 3.0 + 2e-9]}, tensor, 1e-9)
    assert not alike({"shape": [2], "values": [0.5, 3.0 + 4e-9]}, tensor, 1e-9)
    assert not alike({"shape": [2], "values": [0.5, float("nan")]}, tensor, 1e-9)
    assert not alike({"shape": [3], "values": [0.5, 3.0]}, tensor, 1e-9)
    assert not alike({"text": "0.5"}, tensor, 1e-9)
    text = {"text": '{"heads": ["L0H1"], "loss": 0.25, "tiny": 1e-05}'}
    for old, new, same in (
        ("L0H1", "L0H2", False), ("0.25", "0.26", False), ("0.25", "0.2500000001", True),
        ("1e-05", "2e-05", False), ("loss", "direction", False),
    ):  # fmt: skip
        assert alike({"text": text["text"].replace(old, new)}, text, 1e-9) == same
