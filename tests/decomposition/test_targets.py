"""Parts at target heads: padding, what lies upstream, chunks, and MLPs as sources."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import assert_close
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import examples, one_by_one

from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.decomposition.decompose import Decomposition, Node, decompose
from cdt_lens.decomposition.rules import Rules
from cdt_lens.models.heads import Head, Mlp

TARGETS = [Head(0, 2), Head(1, 0), Head(1, 3)]
SETS = ((Head(0, 1),), (Mlp(0),), (Head(0, 3), Mlp(0)), (Mlp(1),), (Node(0, 2, -1),), ())
# Shared keys and values, a norm on q and k, and the rule that hands relevant parts over.
DECOMPOSED = Rules(norm="frozen", attention="decomposed")


def whole(found: Decomposition, site: str, head: Head) -> torch.Tensor:
    part = found.targets[site, head]
    return part.relevant + part.irrelevant


@models(("gpt2", "llama", "qwen3"))
@pytest.mark.parametrize("rules", [Rules(), DECOMPOSED], ids=["default", "decomposed"])
def test_batches_chunks_and_padding_change_nothing(family, backend, rules, tokenizer_folder):
    """Prompts of five lengths: alone and unpadded, and one source set at a time."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = mean_activations(view, data, mlps=True, progress=False)
        found = decompose(view, data, SETS, baseline, rules=rules, targets=TARGETS)
        chunked = decompose(view, data, SETS, baseline, rules=rules, targets=TARGETS, rows=1)
        assert_close(chunked.relevant, found.relevant)
        for key, part in found.targets.items():
            assert_close(chunked.targets[key].relevant, part.relevant)
        for number, one in enumerate(one_by_one(data)):
            single = decompose(view, one, SETS, baseline, rules=rules, targets=TARGETS)
            length = len(one[0].tokens)
            for key, part in found.targets.items():
                rel, irrel = part.relevant[:, number], part.irrelevant[:, number]
                assert_close(rel[:, :length], single.targets[key].relevant[:, 0])
                assert_close(irrel[:, :length], single.targets[key].irrelevant[:, 0])
                assert not bool(rel[:, length:].any())
                assert not bool(irrel[:, length:].any())


@models(("gpt2", "llama", "pythia"))
def test_the_parts_add_up_and_nothing_flows_upstream(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples((8, 8), ("positive",) * 2)
        baseline = mean_activations(view, examples(), mlps=True, progress=False)
        found = decompose(view, data, SETS, baseline, targets=TARGETS)
        batch = next(data.batches(2, sort_by_length=False))
        sites = [(name, layer) for name in "qkvz" for layer in range(view.n_layers)]
        trace = view.run(batch.tokens, sites)
    group = view.n_heads // view.n_kv_heads
    for site, head in found.targets:
        index = head.head // group if site in "kv" else head.head
        full = trace[site, head.layer][:, :, index]
        assert_close(whole(found, site, head), full.expand(len(SETS), *full.shape), atol=1e-12)
        relevant = found.targets[site, head].relevant
        # M1 writes after every head's q, k, v and z; the empty set is nothing.
        assert not bool(relevant[[3, 5]].any())
        if head.layer == 0:
            own = [4] if (site, head) == ("z", Head(0, 2)) else []
            assert relevant.flatten(1).any(1).nonzero().flatten().tolist() == own
        else:
            assert bool(relevant[[0, 1, 2, 4]].flatten(1).any(1).all())


@models(("gpt2", "llama", "gemma2"))
def test_what_an_mlp_takes_from_a_later_head_by_hand(family, backend, tokenizer_folder):
    """All rules through: the irrelevant part is the activation with the MLP's output replaced."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples((7, 7), ("positive",) * 2)
        baseline = mean_activations(view, examples(), mlps=True, progress=False)
        found = decompose(view, data, [Mlp(0)], baseline, rules="ablation", targets=TARGETS[1:])
        batch = next(data.batches(2, sort_by_length=False))
        mean = baseline.mlps_for_batch(view, batch)(0)
        with view.hooked({("mlp_out", 0): lambda _: mean}):
            without = view.run(batch.tokens, [(name, 1) for name in "qkvz"])
    for (site, head), part in found.targets.items():
        index = head.head // (view.n_heads // view.n_kv_heads) if site in "kv" else head.head
        assert_close(part.irrelevant[0], without[site, 1][:, :, index], atol=1e-11)
