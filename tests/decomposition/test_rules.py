"""The rules as formulas: each against its definition, element by element."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.checks import assert_close, unchecked_types
from torch import Tensor

from cdt_lens.core.errors import InputError
from cdt_lens.decomposition import rules as rule
from cdt_lens.decomposition.rules import PRESETS, Rules, resolve_rules


def parts(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """rel, irrel `[2, *shape]` and their sum `[*shape]`, the same for both sources.

    Exact zeros and exact ties of magnitude are among them.
    """
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(shape, generator=generator, dtype=torch.float64)
    irrel = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    full.view(-1)[0::5] = 0.0
    irrel.view(-1)[0::3] = 0.0
    irrel[0].view(-1)[1::4] = full.view(-1)[1::4]
    return full - irrel, irrel, full


def everywhere(x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(at) for at in torch.ones_like(x).nonzero().tolist()]


def share(rel: float, irrel: float, eps: float) -> float:
    """s = |rel| / (|rel| + |irrel| + eps), 0 where both vanish."""
    total = abs(rel) + abs(irrel) + eps
    return 0.0 if total == 0 else abs(rel) / total


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.1])
def test_a_linear_bias_is_shared_by_the_outputs(eps: float):
    rel, irrel, total = parts(3, 5)
    bias = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = irrel.clone()
    for at in everywhere(irrel):
        expected[at] += (1 - share(float(rel[at]), float(irrel[at]), eps)) * bias[at[-1]]
    actual = rule.take_back_bias(irrel + bias, total + bias, bias, eps)
    # (irrel + b) - b does not give irrel back to the last bit, which counts where both vanish.
    clear = (rel.abs() + irrel.abs()) > 1e-12
    assert_close(actual[clear], expected[clear], atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_nothing_relevant_takes_no_bias(eps: float):
    bias = torch.tensor([0.5, -2.0])
    nothing = torch.zeros(1, 3, 2)
    out = rule.take_back_bias((nothing + bias).clone(), (nothing + bias)[0], bias, eps)
    assert torch.equal(out, nothing + bias)  # both parts vanish: the bias is irrelevant
    irrel = torch.ones(1, 3, 2)
    out = rule.take_back_bias((irrel + bias).clone(), (irrel + bias)[0], bias, eps)
    assert torch.equal(out, irrel + bias)


def test_everything_relevant_takes_the_whole_bias():
    bias = torch.tensor([0.5, -2.0], dtype=torch.float64)
    rel = torch.ones(1, 3, 2, dtype=torch.float64)
    out = rule.take_back_bias(bias.expand(1, 3, 2).clone(), rel[0] + bias, bias, 0.0)
    assert torch.equal(out, torch.zeros(1, 3, 2, dtype=torch.float64))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_norms_bias_is_shared_by_its_inputs(eps: float):
    rel, irrel, full = parts(3, 4, seed=2)
    bias = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.zeros_like(irrel)
    for at in everywhere(irrel):
        expected[at] = share(float(rel[at]), float(irrel[at]), eps) * bias[at[-1]]
    assert_close(rule.norm_bias_share(irrel, full, bias, eps), expected, atol=1e-14)


def test_the_sign_rule_gives_all_to_the_larger_part():
    rel, irrel, full = parts(10, 10, seed=3)
    expected = irrel.clone()
    for at in everywhere(irrel):
        r, i = float(rel[at]), float(irrel[at])
        if r * i < 0:
            expected[at] = 0.0 if abs(r) > abs(i) else r + i
    assert_close(rule.larger_takes_all(irrel, full), expected, atol=1e-15)


def test_the_secant_is_the_slope_from_0_to_x():
    x = torch.tensor([-3.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    for function in (torch.nn.functional.gelu, torch.nn.functional.silu, torch.tanh):
        assert_close(rule.secant(function, x) * x, function(x), atol=1e-15)
    at_zero = rule.secant(torch.nn.functional.silu, torch.zeros(3, dtype=torch.float64))
    assert_close(at_zero, torch.full((3,), 0.5, dtype=torch.float64), atol=1e-6)  # its limit


def test_a_gated_product_is_shared_as_the_rule_says():
    rel_f, irrel_f, full_f = parts(2, 3, seed=4)
    rel_u, irrel_u, full_u = parts(2, 3, seed=5)
    through = rule.gated_product(irrel_f, irrel_u, full_f, full_u, "through")
    assert_close(through, irrel_f * irrel_u, atol=1e-15)
    half = rule.gated_product(irrel_f, irrel_u, full_f, full_u, "half")
    cross = irrel_f * rel_u + rel_f * irrel_u
    assert_close(half, irrel_f * irrel_u + cross / 2, atol=1e-14)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_name_and_knows_its_name(name: str):
    assert resolve_rules(name) is PRESETS[name]
    written = PRESETS[name].to_dict()
    assert written.pop("preset") == name
    assert Rules(**written) == PRESETS[name]


def test_rules_of_ones_own_are_custom():
    rules = Rules(norm="frozen", eps=0.5)
    assert resolve_rules(rules) is rules
    assert rules.to_dict()["preset"] == "custom"


def test_the_presets_are_what_they_say():
    official, linear, ablation = PRESETS["official"], PRESETS["linear"], PRESETS["ablation"]
    assert (official.norm, official.attention, official.sign) == ("frozen", "decomposed", True)
    assert (official.bias, official.eps) == ("proportional", 1e-8)
    assert {linear.norm, linear.attention, linear.activation} == {"frozen"}
    assert (linear.product, linear.bias, linear.sign) == ("half", "irrelevant", False)
    through = (ablation.norm, ablation.attention, ablation.activation, ablation.product)
    assert set(through) == {"through"}
    assert (ablation.bias, ablation.sign) == ("irrelevant", False)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(
        InputError, match=r"offical.*stable.*linear.*ablation.*did you mean .official."
    ):
        resolve_rules("offical")


@pytest.mark.parametrize("field", ["norm", "attention", "activation", "product", "bias"])
def test_an_unknown_choice_is_refused_by_name(field: str):
    with unchecked_types(), pytest.raises(InputError, match=f"{field}='nonsense'.*expected one of"):
        dataclasses.replace(Rules(), **{field: "nonsense"})
