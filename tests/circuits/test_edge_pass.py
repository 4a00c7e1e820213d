"""Every family that has direct edges, at the two ends: no edge cut, and all of them."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import assert_close
from helpers.shared import BOTH_CLASSES, models, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import examples
from torch import Tensor

from cdt_lens.circuits.edge_pass import EdgePass, edges_of, places_of
from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.decomposition.baseline import Baseline, counterfactual_baseline
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.task import Batch

PAIRS = examples(seed=9, name="tiny/pairs")


def cut_all(run: EdgePass) -> Tensor:
    cut = torch.zeros(1, len(run.plain), 2 * (3 * run.view.n_heads + 1) + 1, dtype=torch.bool)
    rows, columns = places_of(edges_of(run.view), run.view.n_layers, run.view.n_heads)
    cut[0, rows, columns] = True
    return cut


def plain(view: ModelView, tokens: tuple[int, ...]) -> Tensor:
    return view.logits(torch.tensor([tokens]))[0, -1]


def passes(view: ModelView) -> list[tuple[Batch, EdgePass]]:
    base: Baseline = counterfactual_baseline(view, examples(), PAIRS)
    return [(batch, EdgePass(view, batch, base)) for batch in examples().batches(4)]


# Of one MLP norm shared with attention, fused weights, one head of keys and values.
@models((*BOTH_CLASSES, "falcon", "falcon_mq", "bigcode", "phi3", "gemma"))
def test_with_every_edge_cut_the_model_reads_the_other_prompt(family, backend, tokenizer_folder):
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        for batch, run in passes(view):
            own = torch.stack([plain(view, examples()[i].tokens) for i in batch.index])
            other = torch.stack([plain(view, PAIRS[i].tokens) for i in batch.index])
            found = run.logits(cut_all(run))[0]
            assert_close(found, other.gather(1, batch.candidates), atol=1e-12)
            assert_close(run.full_logits(), own.gather(1, batch.candidates), atol=1e-12)
            assert float((found - run.full_logits()).abs().min()) > 1e-6


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_norm_behind_a_head_is_refused_by_name(family, tokenizer_folder):
    view = shared(family, "bridge", tokenizer_folder)
    with pytest.raises(UnsupportedModelError, match="ln1_post .* no edge can be cut alone"):
        passes(view)


def test_a_norm_over_all_heads_is_refused(tokenizer_folder):
    """An edge into one head's queries or keys would change those of the other heads."""
    view = shared("olmoe", "bridge", tokenizer_folder)
    with pytest.raises(UnsupportedModelError, match="[qk]_norm, which norms all heads together"):
        passes(view)
    passes(shared("qwen3", "bridge", tokenizer_folder))  # a norm of each head


def test_an_attention_that_writes_more_than_its_heads_is_refused(tokenizer_folder):
    """A caller's hook on what attention adds: its heads' outputs no longer sum up to it."""
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    handle = view.blocks[1].hook_attn_out.register_forward_hook(lambda _m, _a, out: 2 * out)
    try:
        with pytest.raises(
            UnsupportedModelError, match="layer 1's attention, .* no sum over heads"
        ):
            passes(view)
    finally:
        handle.remove()
    passes(view)
