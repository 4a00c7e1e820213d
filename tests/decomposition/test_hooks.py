"""What a tap is given at a site: once per replay, the value that goes on into the model."""

from __future__ import annotations

import pytest
import torch
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import examples
from torch import Tensor

from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.decomposition.decompose import build_mlp_resets, build_resets
from cdt_lens.decomposition.hooks import RuleHooks
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import PRESETS, Rules
from cdt_lens.models.heads import Head, Mlp
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.task import Batch

SETS = [(Mlp(0), Mlp(1)), (Head(0, 1),), (Mlp(1), Head(0, 2))]
RULES = {
    **PRESETS,
    "sign": Rules(norm="frozen", sign=True),
    "bias": Rules(bias="proportional"),
}


def engine(view: ModelView, batch: Batch, rules: Rules, *, mlps: bool = True) -> Propagator:
    baseline = mean_activations(view, examples(), mlps=True, progress=False)
    given = {"mlp_baseline": baseline.mlps_for_batch(view, batch)} if mlps else {}
    sites = [(name, layer) for name, layer in view.sites if name in ("z", "mlp_out", "resid_post")]
    return Propagator(
        view, batch.tokens, batch.lengths, baseline.for_batch(view, batch), rules,
        record=sites, **given,
    )  # fmt: skip


@models(("gpt2", "pythia", "gemma2"))
@pytest.mark.parametrize("rules", RULES)
def test_a_tap_is_fed_once_with_what_the_model_gets(family, backend, rules, tokenizer_folder):
    """A hook that put the baseline for an MLP's output fed the tap before and after."""
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        batch = next(examples().batches(3))
        run = engine(view, batch, RULES[rules])
        resets, mlps = build_resets(SETS, batch, view.n_heads), build_mlp_resets(SETS, batch)
        seen: dict[object, list[Tensor]] = {}
        taps = {
            site: lambda value, site=site: seen.setdefault(site, []).append(value.clone())
            for site in [(n, i) for n in ("z", "mlp_out", "resid_post") for i in range(2)]
        }
        made = RuleHooks(run, len(SETS), 0, resets, taps, mlps).build()
        resid = run.trace.resid[0].repeat(len(SETS), 1, 1)
        view.replay(run.trace, resid, 0, made)
        assert {site: len(values) for site, values in seen.items()} == dict.fromkeys(taps, 1)
        for layer, mask in mlps.items():
            value = seen["mlp_out", layer][0]
            baseline = run.mlp_baseline(layer).expand(value.shape[1:])
            for row, inside in enumerate(mask.tolist()):
                assert torch.equal(value[row], baseline) is inside


def test_an_mlp_without_a_baseline_is_refused(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    batch = next(examples().batches(3))
    for rules in (PRESETS["stable"], PRESETS["two-ended"]):
        run = engine(view, batch, rules, mlps=False)
        with pytest.raises(InputError, match="MLP 1 is a source.*mlp_baseline"):
            run.propagate({}, {}, build_mlp_resets([(Mlp(1),)], batch))
