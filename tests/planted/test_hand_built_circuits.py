"""What each hand-built circuit promises, by real interventions on the model."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import pytest
import torch
from helpers.checks import assert_close

from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.decomposition.baseline import Baseline, mean_activations
from cdt_lens.models.heads import Head, all_heads, heads_to_mask, mask_to_heads
from cdt_lens.models.view import view_of
from cdt_lens.planted.catalogue import PlantedCircuit, planted_circuit
from cdt_lens.planted.hand_built_circuits import HAND_BUILT, WORDS, plant_by_hand
from cdt_lens.scoring.methods import exact_ablation
from cdt_lens.scoring.sweep import score_heads

NAMES = pytest.mark.parametrize("name", HAND_BUILT)
EXACT = 2e-4  # what is left of the norms (see `hand_built`)


@functools.cache
def planted(name: str, seed: int = 0) -> PlantedCircuit:
    return planted_circuit(f"hand-{name}", seed=seed)


@functools.cache
def baseline(name: str, seed: int = 0) -> Baseline:
    circuit = planted(name, seed)
    return mean_activations(circuit.model, circuit.train, progress=False)


def truth(name: str, seed: int = 0) -> tuple[Head, ...]:
    return mask_to_heads(planted(name, seed).truth)


def without(name: str, *removed: Head, seed: int = 0, metric: str = "direction") -> float:
    """The metric on held-out prompts with some heads mean-ablated."""
    circuit = planted(name, seed)
    kept = [head for head in all_heads(*circuit.truth.shape) if head not in removed]
    (value,) = circuit_metric(
        circuit.model, [kept], circuit.valid, baseline(name, seed), metric=metric, progress=False
    )
    return float(value)


def distractors(name: str, seed: int = 0) -> tuple[Head, ...]:
    return mask_to_heads(~planted(name, seed).truth)


@functools.cache
def all_z(name: str, zeroed: Head | None = None) -> torch.Tensor:
    """`[example, layer, head, d_head]` at the answers of held-out prompts; `zeroed` writes 0."""
    circuit = planted(name)
    view, sites, rows = view_of(circuit.model), [("z", 0), ("z", 1)], []

    def erase(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, :, zeroed.head] = 0
        return value

    for example in circuit.valid:
        with view.hooked({} if zeroed is None else {("z", zeroed.layer): erase}):
            trace = view.run(torch.tensor([example.tokens]), sites)
        rows.append(torch.stack([trace[site][0, -1] for site in sites]))
    return torch.stack(rows)


def z(name: str, head: Head, *, zeroed: Head | None = None) -> torch.Tensor:
    """`[example, d_head]`; what a blueprint's first channel reads is the last of them."""
    return all_z(name, zeroed)[:, head.layer, head.head]


# All of them -------------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("seed", [0, 1])
def test_the_circuit_alone_does_the_task_and_the_rest_does_nothing(name, seed):
    everything = without(name, seed=seed)
    assert everything == pytest.approx(1.0, abs=EXACT)
    assert without(name, seed=seed, metric="accuracy") == 1.0
    alone = distractors(name, seed)
    assert without(name, *alone, seed=seed) == pytest.approx(1.0, abs=EXACT)
    assert without(name, *alone, seed=seed, metric="accuracy") == 1.0
    assert without(name, *truth(name, seed), seed=seed) == pytest.approx(0.0, abs=EXACT)


@NAMES
def test_no_distractor_matters_in_any_company(name):
    """Removed by itself or together with any planted head, it changes no number."""
    circuit, heads = planted(name), truth(name)
    for size in range(len(heads) + 1):
        for removed in itertools.combinations(heads, size):
            kept = [h for h in all_heads(*circuit.truth.shape) if h not in removed]
            sets = [kept, *([h for h in kept if h != d] for d in distractors(name))]
            values = circuit_metric(
                circuit.model, sets, circuit.valid, baseline(name), progress=False
            )
            assert_close(values, values[:1].expand(len(sets)), atol=EXACT)


@NAMES
def test_a_planted_head_stands_among_many(name):
    circuit = planted(name)
    assert circuit.truth.shape == (2, 8)
    assert 1 <= circuit.truth.sum() <= 3
    others = distractors(name)
    scores = exact_ablation(circuit.model, circuit.train, baseline(name), progress=False)
    assert max(abs(float(scores.values[h.layer, h.head])) for h in others) < EXACT
    # Not because they are empty: some read the label, and some write into the answer.
    signs = torch.tensor([1.0 if e.label == "yes" else -1.0 for e in circuit.valid])
    read = [h for h in others if (z(name, h)[:, -1] * signs).mean() > 0.99]
    written = [h for h in others if scores.per_example[:, h.layer, h.head].abs().mean() > 0.05]
    # With exclusive or, and between opposite cues, no single look tells the label.
    assert read or name in ("gated-and", "composition")
    assert written or name == "dead"


@NAMES
def test_the_reference_of_a_planted_head_knows_no_answer(name):
    circuit, reference = planted(name), baseline(name).means
    for head in truth(name):
        at_answer = reference[head.layer, 1, head.head]
        assert_close(at_answer, torch.zeros_like(at_answer), atol=1e-5)
        varies = z(name, head)[:, -1].abs().mean()
        if (name, head.layer) not in (("backup", 1), ("composition", 0)):
            assert varies == pytest.approx(1.0, abs=EXACT)
    assert circuit.why == HAND_BUILT[name].why


@NAMES
def test_every_prompt_stands_beside_its_opposites(name):
    planting = plant_by_hand(name)
    seen = set()
    for split, n in ((planting.train, 32), (planting.valid, 24)):
        assert len(split) == n
        assert split.counts == {"yes": n // 2, "no": n // 2}
        assert len({len(example.tokens) for example in split}) >= 3
        shapes = Counter(_shape(example.prompt) for example in split)
        assert set(shapes.values()) == {4}  # two cues, two switches
        assert not seen & set(shapes)
        seen |= set(shapes)
        for example in split:
            assert [WORDS[token] for token in example.tokens] == example.prompt.split()
            assert WORDS[example.answers[0]] == example.label == _right(example.prompt, name)
            assert {WORDS[t] for t in (*example.answers, *example.others)} == {"yes", "no"}


def _shape(prompt: str) -> str:
    for word, kind in (("plus", "CUE"), ("minus", "CUE"), ("up", "SWITCH"), ("down", "SWITCH")):
        prompt = prompt.replace(word, kind)
    return prompt


def _right(prompt: str, name: str) -> str:
    """The answer, read off the words."""
    marked = prompt.split("mark ")[-1]  # everything, where there is no mark
    cue = marked.startswith("plus") if name == "composition" else "plus" in prompt
    yes = cue == ("up" in prompt) if name == "gated-and" else cue
    return "yes" if yes else "no"


def test_the_seed_moves_the_heads_and_the_prompts():
    plantings = [plant_by_hand("or", seed=seed) for seed in range(6)]
    assert len({p.heads for p in plantings}) > 3
    assert len({p.train.hash for p in plantings}) == 6
    again = plant_by_hand("or", seed=3)
    assert again.heads == plantings[3].heads
    assert again.train.hash == plantings[3].train.hash


# Each of them ------------------------------------------------------------------------------------


def test_cancellation():
    first, second, solver = truth("cancellation")
    one, two = sorted(without("cancellation", head) for head in (first, second))
    assert (one, two) == (pytest.approx(-1.0, abs=EXACT), pytest.approx(3.0, abs=EXACT))
    assert without("cancellation", first, second) == pytest.approx(1.0, abs=EXACT)
    assert without("cancellation", solver) == pytest.approx(0.0, abs=EXACT)


def test_duplication():
    heads = truth("duplication")
    for size, left in ((1, 2 / 3), (2, 1 / 3), (3, 0.0)):
        for removed in itertools.combinations(heads, size):
            assert without("duplication", *removed) == pytest.approx(left, abs=EXACT)


@pytest.mark.parametrize("seed", [0, 1])
def test_or_needs_either(seed):
    a, b = truth("or", seed)
    assert without("or", a, seed=seed) == pytest.approx(1.0, abs=EXACT)
    assert without("or", b, seed=seed) == pytest.approx(1.0, abs=EXACT)
    assert without("or", a, b, seed=seed) == pytest.approx(0.0, abs=EXACT)


@pytest.mark.parametrize("name", ["and", "gated-and"])
def test_and_needs_both(name):
    a, b = truth(name)
    for removed in ((a,), (b,), (a, b)):
        assert without(name, *removed) == pytest.approx(0.0, abs=EXACT)


def test_composition_goes_through_the_pattern_alone():
    circuit = planted("composition")
    marker, reader = truth("composition")
    assert (marker.layer, reader.layer) == (0, 1)
    for removed in ((marker,), (reader,)):
        assert without("composition", *removed) == pytest.approx(0.0, abs=EXACT)
    frozen = score_heads(
        circuit.model, circuit.train, baseline("composition"), rules="stable", progress=False
    )
    assert abs(float(frozen.values[marker.layer, marker.head])) < EXACT
    assert float(frozen.values[reader.layer, reader.head]) == pytest.approx(1.0, abs=EXACT)
    # Without the note the reader looks at both cues alike.
    assert_close(z("composition", reader)[:, -1].abs(), torch.ones(24), atol=EXACT)
    assert_close(z("composition", reader, zeroed=marker), torch.zeros(24, 8), atol=1e-3)


def test_a_backup_is_silent_until_it_is_needed():
    first, second = truth("backup")
    assert without("backup", first) == pytest.approx(1.0, abs=EXACT)
    assert without("backup", second) == pytest.approx(1.0, abs=EXACT)
    assert without("backup", first, second) == pytest.approx(0.0, abs=EXACT)
    assert_close(z("backup", second), torch.zeros(24, 8), atol=1e-6)
    awake = z("backup", second, zeroed=first)[:, -1]
    signs = [1.0 if e.label == "yes" else -1.0 for e in planted("backup").valid]
    assert_close(awake, torch.tensor(signs), atol=EXACT)


def test_dead_heads_read_the_cue_and_write_nothing():
    circuit = planted("dead")
    (solver,) = truth("dead")
    view = view_of(circuit.model)
    outputs = torch.stack([block.attn.W_O for block in view.blocks])
    dead = mask_to_heads(outputs.flatten(2).abs().sum(-1) == 0)
    assert len(dead) > 5
    for head in dead:
        assert_close(z("dead", head), z("dead", solver), atol=1e-5)
    assert heads_to_mask([solver], 2, 8).equal(circuit.truth)
