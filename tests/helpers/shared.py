"""Tiny models that many tests read and none may change, built once a session."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch

from cdt_lens.models.loading import has_hooked_transformer
from cdt_lens.models.view import ModelView
from helpers.tiny_models import EXPERTS, FAMILIES
from helpers.wrapped import needs_hooked, view, wrap

# HookedTransformer does not read these right.
BRIDGE_ONLY = ("gemma2", "gemma3", "granite", "smollm3", "cohere")
NOT_HOOKED = BRIDGE_ONLY + EXPERTS
HOOKED_ONLY = ("gptj", "gpt_neo", "opt")  # the bridge cannot edit their attention pattern
BRIDGE_OF_4 = ("cohere",)  # the bridge of transformer-lens 3 does not read these right
EVERY_FAMILY = tuple(FAMILIES)
BOTH_CLASSES = tuple(f for f in FAMILIES if f not in BRIDGE_ONLY + HOOKED_ONLY)
# What the bridge of this environment reads.
BRIDGE_FAMILIES = tuple(
    family
    for family in FAMILIES
    if family not in HOOKED_ONLY and not (family in BRIDGE_OF_4 and has_hooked_transformer())
)


needs_bridge_of_4 = pytest.mark.skipif(
    has_hooked_transformer(), reason="the bridge of transformer-lens 3 reads it as another model"
)


def models(families: Sequence[str] = EVERY_FAMILY) -> pytest.MarkDecorator:
    """Parametrises a test over (family, backend), each family in every class that reads it."""
    cases = []
    for family in families:
        if family not in NOT_HOOKED:
            cases.append(pytest.param(family, "hooked", marks=needs_hooked, id=f"{family}-hooked"))
        if family not in HOOKED_ONLY:
            marks = needs_bridge_of_4 if family in BRIDGE_OF_4 else ()
            cases.append(pytest.param(family, "bridge", marks=marks, id=f"{family}-bridge"))
    return pytest.mark.parametrize(("family", "backend"), cases)


def classes_of(family: str) -> list[str]:
    """Return the classes that read the family in this environment, for one test over both."""
    hooked = ["hooked"] if has_hooked_transformer() and family not in NOT_HOOKED else []
    return [*hooked, *(["bridge"] if family in BRIDGE_FAMILIES + EXPERTS else [])]


@functools.cache
def shared(family: str, backend: str, folder: str, dtype: torch.dtype = torch.float64) -> ModelView:
    """The tiny model; call it under Float64Throughout when float64 must mean all the way."""
    return view(family, backend, folder, dtype)


@functools.cache
def other_weights(family: str, folder: str, dtype: torch.dtype = torch.float64) -> ModelView:
    """The same architecture, but for one changed weight."""
    model = wrap(family, "bridge", folder, dtype)
    model.embed.weight.detach()[5, 5] += 1.0
    return ModelView(model)
