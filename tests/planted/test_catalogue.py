"""Planted circuits as a person gets them: by name, as either class, ready to be scored."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import assert_close, unchecked_types
from helpers.wrapped import BACKENDS

from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.decomposition.rules import PRESETS
from cdt_lens.models.loading import has_hooked_transformer
from cdt_lens.models.view import view_of
from cdt_lens.planted.catalogue import PLANTED, planted_circuit
from cdt_lens.planted.hand_built_circuits import HAND_BUILT
from cdt_lens.planted.planting import SPECIAL
from cdt_lens.planted.trained_circuits import TRAINED
from cdt_lens.scoring.agreement import auroc, average_precision
from cdt_lens.scoring.methods import exact_ablation
from cdt_lens.scoring.sweep import score_heads

NAMES = pytest.mark.parametrize("name", PLANTED)


def test_the_registry_names_every_circuit():
    assert set(PLANTED) == {f"trained-{n}" for n in TRAINED} | {f"hand-{n}" for n in HAND_BUILT}
    assert all(PLANTED.values())


@pytest.mark.parametrize("backend", BACKENDS)
@NAMES
def test_every_circuit_can_be_scored_by_every_preset(name, backend):
    circuit = planted_circuit(name, backend=backend)
    view, few = view_of(circuit.model), circuit.train[:8]
    assert view.is_bridge == (backend == "bridge")
    assert circuit.name == view.name == name
    assert circuit.truth.shape == (view.n_layers, view.n_heads)
    assert 0 < circuit.truth.sum() <= circuit.truth.numel() / 4
    assert not circuit.model.training
    baseline = mean_activations(circuit.model, few, progress=False)
    for rules in PRESETS:
        found = score_heads(circuit.model, few, baseline, rules=rules, progress=False)
        assert found.values.isfinite().all()
        assert 0 <= auroc(found.values.abs(), circuit.truth) <= 1
        assert 0 < average_precision(found.values.abs(), circuit.truth) <= 1


@pytest.mark.skipif(not has_hooked_transformer(), reason="needs both classes")
@pytest.mark.parametrize("name", ["trained-two-circuits", "hand-or", "hand-gated-and"])
def test_both_classes_give_the_same_scores(name):
    values = []
    for backend in ("hooked", "bridge"):
        circuit = planted_circuit(name, backend=backend)
        baseline = mean_activations(circuit.model, circuit.train, progress=False)
        values.append(exact_ablation(circuit.model, circuit.train, baseline, progress=False).values)
    assert_close(*values, atol=1e-4)


@pytest.mark.skipif(not has_hooked_transformer(), reason="the bridge is all there is")
def test_hooked_transformer_is_taken_where_it_exists():
    assert all(
        not view_of(planted_circuit(name).model).is_bridge for name in ("trained-gpt2", "hand-or")
    )


@NAMES
def test_the_tokenizer_knows_the_words(name):
    circuit = planted_circuit(name)
    tokenizer = circuit.model.tokenizer
    for example in circuit.valid:
        ids = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        assert tuple(ids) == example.tokens
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == list(SPECIAL)
    assert tokenizer.bos_token == "<s>"


def test_the_same_seed_gives_the_same_circuit():
    one, two, other = (planted_circuit("hand-and", seed=seed) for seed in (4, 4, 5))
    assert torch.equal(one.truth, two.truth)
    assert one.train.hash == two.train.hash != other.train.hash
    weights = (dict(c.model.named_parameters()) for c in (one, two))
    first, second = weights
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_noise_is_as_loud_as_asked():
    quiet, loud = (planted_circuit("trained-attention-only", noise=n) for n in (0.0, 0.5))
    scores = []
    for circuit in (quiet, loud):
        baseline = mean_activations(circuit.model, circuit.train, progress=False)
        scores.append(exact_ablation(circuit.model, circuit.train, baseline, progress=False).values)
    assert not scores[0][~quiet.truth].any()
    assert scores[1][~loud.truth].all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hand-xor", {}, "'hand-xor': expected one of trained-gpt2, .*hand-dead"),
        ("or", {}, "'or': expected one of"),
        ("hand-or", {"noise": 0.5}, "noise=0.5 for hand-or: .* Omit noise for the others"),
        ("trained-llama", {"noise": -1.0}, "noise=-1.0.* at least 0"),
        ("trained-llama", {"noise": float("nan")}, "noise=nan.* at least 0"),
        ("hand-or", {"backend": "both"}, "backend='both': expected one of auto, hooked, bridge"),
    ],
)
def test_mistakes_are_refused(name, options, message):
    with unchecked_types(), pytest.raises(InputError, match=message):
        planted_circuit(name, **options)


@pytest.mark.parametrize("name", PLANTED)
def test_the_default_rules_find_every_planted_circuit(name: str):
    """Every head of the circuit scores higher in magnitude than any other head."""
    planted = planted_circuit(name)
    baseline = mean_activations(planted.model, planted.train, progress=False)
    scores = score_heads(planted.model, planted.train, baseline, progress=False)
    assert auroc(scores.values.abs(), planted.truth) == 1.0
