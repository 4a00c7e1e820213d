"""The ensemble: its members by their own functions, the arithmetic with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import by_hand
from helpers.checks import assert_close
from helpers.shared import models, shared
from helpers.tiny_tasks import many

from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.scoring.ensemble import ensemble_scores, without_unit
from cdt_lens.scoring.methods import attribution_patching, integrated_gradients
from cdt_lens.scoring.one_pass import one_pass


@models(("gpt2", "llama"))
def test_it_is_the_mean_of_its_members_at_the_same_spread(family, backend, tokenizer_folder):
    view, data = shared(family, backend, tokenizer_folder, torch.float32), many(12)
    inputs = (view, data, mean_activations(view, data, progress=False))
    found = ensemble_scores(*inputs, progress=False)
    ends = one_pass(*inputs, slopes="gradient", steps="ends", progress=False)
    members = [
        member.values.double().numpy()
        for member in (
            ends,
            integrated_gradients(*inputs, progress=False),
            attribution_patching(*inputs, progress=False),
        )
    ]
    expected = np.mean([m / m.std() for m in members], axis=0) * members[0].std()
    assert_close(found.values.double(), torch.from_numpy(expected), atol=1e-6)
    for layer, head in ((0, 1), (1, 3)):
        rows = found.per_example[:, layer, head].tolist()
        mean = by_hand.balanced(rows, data)
        assert mean == pytest.approx(float(found.values[layer, head]), abs=1e-6)
    assert bool((found.stderr > 0).all())
    assert found.direction == ends.direction
    assert found.method == found.provenance.options["method"] == "ensemble"


def test_members_whose_heads_are_all_alike_count_nothing():
    flat = torch.full((2, 3), 0.25)
    assert not bool(without_unit(flat, flat).any())
