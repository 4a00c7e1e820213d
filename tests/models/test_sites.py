"""Every site is seen in the same shape, and edits are obeyed in the same way, in both classes."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import assert_close, left_untouched
from helpers.shared import BOTH_CLASSES, models, shared
from helpers.tiny_models import Float64Throughout, prompts
from helpers.wrapped import needs_hooked
from torch import Tensor

from cdt_lens.models.sites import Site, find_sites
from cdt_lens.models.view import ModelView

# What every model of every family has in every layer.
EVERYWHERE = {"q", "k", "v", "pattern", "z", "attn_out", "mlp_out", "resid_post"}


def edited(view: ModelView, site: Site) -> Tensor:
    """The final residual stream when a site's activation is made a tenth larger."""
    with view.hooked({site: lambda value: value * 1.1}):
        return view.run(prompts(2, 7)).resid[-1]


def in_blocks(view: ModelView) -> set[Site]:
    return {site for site in view.sites if site[1] < view.n_layers}


@models()
def test_an_edit_at_any_site_is_obeyed(family, backend, tokenizer_folder):
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        plain = view.run(prompts(2, 7)).resid[-1]
        view_sites = in_blocks(view)
        assert {name for name, _ in view_sites} >= EVERYWHERE
        for site in view_sites:
            assert not torch.equal(edited(view, site), plain), site
        assert torch.equal(view.run(prompts(2, 7)).resid[-1], plain)


@needs_hooked
@pytest.mark.parametrize("family", BOTH_CLASSES)
def test_both_classes_have_the_same_sites_with_the_same_meaning(family, tokenizer_folder):
    with Float64Throughout():
        hooked, bridge = (shared(family, x, tokenizer_folder) for x in ("hooked", "bridge"))
        assert in_blocks(hooked) == in_blocks(bridge)
        sites = sorted(in_blocks(hooked))
        traces = [view.run(prompts(2, 7), sites) for view in (hooked, bridge)]
        for site in sites:
            one, other = (trace[site] for trace in traces)
            if not site[0].startswith(("q_norm", "k_norm")):  # HookedTransformer flattens these
                assert_close(one, other, atol=1e-10)
            if site[0] != "attn.in":  # to look at only: HookedTransformer passes it three times
                assert_close(edited(hooked, site), edited(bridge, site), atol=1e-9)


@models(("gpt2", "llama"))
def test_looking_changes_nothing(family, backend, tokenizer_folder):
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        plain = view.run(prompts(2, 7)).resid[-1]
        seen: list[Site] = []
        with (
            left_untouched(view.tl),
            view.hooked({site: lambda value, site=site: seen.append(site) for site in view.sites}),
        ):
            assert torch.equal(view.run(prompts(2, 7)).resid[-1], plain)
        assert set(seen) >= in_blocks(view)


@models(("gpt2", "gemma3"))
def test_sites_belong_to_the_model_and_its_layers(family, backend, tokenizer_folder):
    view = shared(family, backend, tokenizer_folder)
    places = find_sites(view.tl, view.n_layers)
    assert set(places) == view.sites
    modules = set(view.tl.modules())
    assert all(place.module in modules for place in places.values())
    layers = {layer for name, layer in places if name == "z"}
    assert layers == set(range(view.n_layers))
    assert {layer for name, layer in places if name.startswith("ln_final")} == {view.n_layers}
