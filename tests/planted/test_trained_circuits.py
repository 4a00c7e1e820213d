"""Trained circuits: what was learnt, by which heads, and that the truth is the truth."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers.checks import assert_close, assert_same_bits

from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.models.heads import Head, all_heads, mask_to_heads
from cdt_lens.planted import trained_circuits
from cdt_lens.planted.catalogue import PlantedCircuit, planted_circuit
from cdt_lens.planted.trained_circuits import (
    D_HEAD,
    N_WORDS,
    PAIR,
    TRAINED,
    _by_head,
    _new_model,
    _only,
    _outputs,
    _trained,
    accuracy,
    plant_by_training,
    prompts,
)
from cdt_lens.tasks.task import Examples

NAMES = pytest.mark.parametrize("name", TRAINED)
SINGLE = pytest.mark.parametrize("name", [name for name in TRAINED if name != "two-circuits"])


@functools.cache
def planted(name: str) -> PlantedCircuit:
    return planted_circuit(f"trained-{name}")


def accuracies(name: str, data: Examples, *circuits: tuple[Head, ...]) -> list[float]:
    """Label-balanced accuracy of each circuit, by ablating all other heads."""
    circuit = planted(name)
    baseline = mean_activations(circuit.model, circuit.train, progress=False)
    return circuit_metric(
        circuit.model, circuits, data, baseline, metric="balanced_accuracy", progress=False
    ).tolist()


@NAMES
def test_the_circuit_solves_the_task_and_every_head_of_it_is_needed(name):
    circuit = planted(name)
    everyone, heads = all_heads(*circuit.truth.shape), mask_to_heads(circuit.truth)
    without = [tuple(h for h in everyone if h != head) for head in heads]
    rest = tuple(h for h in everyone if h not in heads)
    full, alone, others, *removed = accuracies(name, circuit.valid, everyone, heads, rest, *without)
    assert full > 0.95  # in spite of the noise
    assert alone > 0.95
    assert others < 0.5
    # Of two circuits, one head's end is the end of one label's answers only.
    assert max(removed) < (0.8 if name == "two-circuits" else 0.5)


def test_each_of_two_circuits_has_words_of_its_own():
    circuit = planted("two-circuits")
    heads = mask_to_heads(circuit.truth)
    assert [str(head) for head in heads] == ["L0H1", "L1H2", "L1H5", "L2H6"]
    pairs = {"a": heads[:2], "b": heads[2:]}
    everyone = all_heads(*circuit.truth.shape)
    for label, pair in pairs.items():
        (other,) = (p for p in pairs.values() if p != pair)
        items = tuple(e for e in (*circuit.train, *circuit.valid) if e.label == label)
        data = Examples(items, circuit.valid.labels, "one label")
        first, last = ([h for h in everyone if h != head] for head in pair)
        kept = [h for h in everyone if h not in other]
        found = accuracies("two-circuits", data, pair, kept, other, first, last)
        assert min(found[:2]) > 0.9, label
        assert max(found[2:]) < 0.6, label


@SINGLE
def test_no_other_head_was_trained(name):
    """Their weights are those that the model began with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = _new_model(name)
    after = _new_model(name)
    after.load_state_dict(_trained(name, 0))
    for layer, (a, b) in enumerate(zip(_outputs(before), _outputs(after), strict=True)):
        for head, (old, new) in enumerate(zip(_by_head(a), _by_head(b), strict=True)):
            assert torch.equal(old, new) == (Head(layer, head) not in PAIR)
    query = "transformer.h.0.attn.c_attn.weight", "model.layers.0.self_attn.q_proj.weight"
    (old,), (new,) = ([w for n, w in m.named_parameters() if n in query] for m in (before, after))
    old, new = (w if name == "llama" else w.T for w in (old, new))
    same = [
        torch.equal(old[i : i + D_HEAD], new[i : i + D_HEAD]) for i in range(0, 4 * D_HEAD, D_HEAD)
    ]
    assert same == [True, False, True, True]


@NAMES
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_others_write_noise_of_the_size_asked_for(name, noise):
    planting = plant_by_training(name, noise=noise)
    for layer, output in enumerate(_outputs(planting.hf_model)):
        norms = _by_head(output).flatten(1).norm(dim=1)
        inside = [head.head for head in planting.heads if head.layer == layer]
        others = torch.tensor([h not in inside for h in range(len(norms))])
        expected = (noise * norms[inside].mean()).expand(int(others.sum()))
        assert_close(norms[others], expected, atol=1e-5)


def test_two_circuits_are_two_models_side_by_side():
    """On the words of one, the whole gives the logits of the one."""
    whole = plant_by_training("two-circuits", noise=0.0).hf_model
    tokens = prompts(20, torch.Generator().manual_seed(3))
    for number in (0, 1):
        part = _new_model("llama").eval()
        part.load_state_dict(_trained("llama", number))
        own = slice(3 + N_WORDS * number, 3 + N_WORDS * (number + 1))
        with torch.no_grad(), _only(part, PAIR):
            expected, found = part(tokens).logits, whole(tokens + N_WORDS * number).logits
            assert accuracy(part) > 0.99
        assert_close(found[..., own], expected[..., 3:], atol=1e-4)


@NAMES
def test_prompts_ask_for_a_partner_that_they_showed(name):
    circuit = planted(name)
    assert not {e.tokens for e in circuit.train} & {e.tokens for e in circuit.valid}
    for data, n in ((circuit.train, 60), (circuit.valid, 30)):
        assert data.counts == {"a": n // 2, "b": n // 2}
        assert {len(e.tokens) for e in data} == {7, 9, 11}
        for example in data:
            words = example.prompt.split()
            asked = words[:6].index(words[-1])
            assert asked % 2 == 0
            assert example.tokens[asked + 1] == example.answers[0]
            assert set(example.others) == {*example.tokens[1:6:2]} - {*example.answers}
            if name == "two-circuits":
                assert {word[0] for word in words} == {example.label}


def test_a_seed_that_never_learns_is_refused(monkeypatch):
    monkeypatch.setattr(trained_circuits, "STEPS", 1)
    monkeypatch.setattr(trained_circuits, "ATTEMPTS", 2)
    with pytest.raises(InputError, match="seed=77: llama did not learn the task; use another"):
        plant_by_training("llama", seed=77)


def test_the_largest_seed_plants_too(monkeypatch):
    monkeypatch.setattr(trained_circuits, "_learn", lambda *_: True)
    planted = plant_by_training("attention-only", seed=2**63 - 1)
    assert len(planted.train) == trained_circuits.N_TRAIN


def test_an_attempt_that_is_stuck_is_followed_by_another(monkeypatch):
    seeds, learn = [], trained_circuits._learn

    def stuck_at_first(model, generator):
        seeds.append(generator.initial_seed())
        return len(seeds) > 1 and learn(model, generator)

    monkeypatch.setattr(trained_circuits, "_learn", stuck_at_first)
    _trained.__wrapped__("attention-only", 0)
    assert seeds[:2] == [0, 1000]


def test_training_leaves_nothing_behind_and_is_kept():
    before = torch.get_num_threads(), torch.get_rng_state(), torch.is_grad_enabled()
    with torch.no_grad():
        weights = _trained.__wrapped__("attention-only", 0)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.is_grad_enabled() == before[2]
    for name, value in _trained("attention-only", 0).items():
        assert_same_bits(weights[name], value)
    one, two = (plant_by_training("attention-only").hf_model for _ in range(2))
    next(one.parameters()).zero_()
    assert next(two.parameters()).any()  # what one caller does, the next does not see
    assert plant_by_training("attention-only").hf_model.transformer.wte.weight.any()
    assert not any(p.requires_grad for p in itertools.chain(one.parameters(), two.parameters()))
    assert not any(m._forward_pre_hooks for m in _outputs(one))
