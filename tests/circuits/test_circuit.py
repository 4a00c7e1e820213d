"""Circuits, their random controls, and proof (k): what is saved is what is loaded, or refused."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sample_graph, sample_results
from helpers.checks import assert_same_bits, unchecked_types
from helpers.shared import models, other_weights, shared
from helpers.tiny_tasks import examples

from cdt_lens.circuits.circuit import (
    Circuit,
    near_zero_heads,
    random_heads,
    random_heads_like,
)
from cdt_lens.circuits.faithfulness import circuit_faithfulness, faithfulness_curve
from cdt_lens.circuits.greedy import greedy_circuit
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.artifacts import load_artifact, save_artifact
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.scoring.sweep import score_heads


def circuit(seed: int = 0) -> Circuit:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 4, generator=generator)
    values[1, 1] = torch.nan
    return Circuit(
        heads=(Head(2, 3), Head(0, 1), Head(2, 3)),
        n_layers=3,
        n_heads=4,
        scores=values,
        stderr=values.abs() / 7,
        selection={"method": "cdt", "by": "magnitude", "k": 2},
        provenance=sample_results.provenance(),
    )


def with_graph() -> Circuit:
    graph = sample_graph.small()
    return Circuit(graph.heads, 2, 2, graph=graph)


def assert_equal(a: Circuit, b: Circuit) -> None:
    assert (a.heads, a.n_layers, a.n_heads) == (b.heads, b.n_layers, b.n_heads)
    assert dict(a.selection) == dict(b.selection)
    assert a.provenance == b.provenance
    assert (a.graph is None) == (b.graph is None)
    if a.graph is not None and b.graph is not None:
        assert a.graph.to_dict() == b.graph.to_dict()
    for one, other in ((a.scores, b.scores), (a.stderr, b.stderr)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_same_bits(one, other)


# What a circuit is ---------------------------------------------------------------------------------


def test_heads_are_a_set_in_order():
    made = circuit()
    assert made.heads == (Head(0, 1), Head(2, 3))
    assert len(made) == 2
    assert Head(2, 3) in made
    assert Head(2, 2) not in made
    assert int(made.mask.sum()) == 2
    assert bool(made.mask[0, 1])
    assert bool(made.mask[2, 3])
    assert sorted(made.heads + made.complement) == list(all_heads(3, 4))


def test_a_head_outside_the_model_is_refused():
    for head in (Head(3, 0), Head(0, 4)):
        with pytest.raises(InputError, match=str(head)):
            replace(circuit(), heads=(head,))


def test_the_table_has_a_row_for_each_head():
    made = circuit()
    assert made.scores is not None
    table = made.to_dataframe()
    assert table["head"].tolist() == ["L0H1", "L2H3"]
    assert table["score"].tolist() == pytest.approx(
        [float(made.scores[0, 1]), float(made.scores[2, 3])]
    )
    empty = Circuit((), 3, 4)
    assert list(empty.to_dataframe().columns) == list(table.columns)
    assert len(empty.to_dataframe()) == 0
    assert "0 of 12 heads" in empty._repr_html_()
    assert "L2H3" in made._repr_html_()


def test_a_graph_of_another_shape_is_refused_and_one_that_fits_is_shown():
    graph = sample_graph.small()
    with pytest.raises(InputError, match="n_layers=3, its graph has 2"):
        Circuit((), 3, 2, graph=graph)
    with pytest.raises(InputError, match="n_heads=4, its graph has 2"):
        Circuit((), 2, 4, graph=graph)
    assert "<svg" not in Circuit(graph.heads, 2, 2)._repr_html_()
    assert "<svg" in with_graph()._repr_html_() and "Circuit graph" in with_graph()._repr_html_()


# Random controls -----------------------------------------------------------------------------------


def test_random_heads_are_reproducible_and_of_the_right_size():
    for k in (0, 1, 5, 12):
        drawn = random_heads(k, 3, 4, seed=7)
        assert drawn == random_heads(k, 3, 4, seed=7)
        assert len(set(drawn)) == k
        assert list(drawn) == sorted(drawn)
        assert set(drawn) <= set(all_heads(3, 4))
    assert len({random_heads(5, 3, 4, seed=seed) for seed in range(10)}) > 5
    for k in (-1, 13):
        with pytest.raises(InputError, match=f"k={k}"):
            random_heads(k, 3, 4, seed=0)


def test_random_heads_are_uniform():
    counts = Counter(head for seed in range(600) for head in random_heads(3, 3, 4, seed=seed))
    assert len(counts) == 12
    assert max(counts.values()) < 1.4 * min(counts.values())  # 150 expected, about 11 of spread


def test_random_heads_like_keep_the_number_in_each_layer():
    heads = (Head(0, 1), Head(2, 0), Head(2, 2), Head(2, 3), Head(2, 3))
    for seed in range(5):
        drawn = random_heads_like(heads, 3, 4, seed=seed)
        assert drawn == random_heads_like(reversed(heads), 3, 4, seed=seed)
        assert Counter(head.layer for head in drawn) == {0: 1, 2: 3}
        assert len(set(drawn)) == 4
    assert len({random_heads_like(heads, 3, 4, seed=seed) for seed in range(20)}) > 8
    assert random_heads_like((), 3, 4, seed=0) == ()
    assert random_heads_like(all_heads(3, 4), 3, 4, seed=0) == all_heads(3, 4)
    with pytest.raises(InputError, match="L3H0"):
        random_heads_like([Head(3, 0)], 3, 4, seed=0)


# On disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        circuit(),
        Circuit((), 1, 1),
        replace(circuit(), scores=None),
        replace(circuit(), provenance=None),
        with_graph(),
    ],
)
def test_round_trip_is_bit_equal(made: Circuit, tmp_path: Path):
    assert_equal(Circuit.load(made.save(tmp_path / "c.json")), made)


def test_a_circuit_without_a_graph_is_saved_as_before_there_were_any(tmp_path: Path):
    """So files of version 0.2, which know no graph, still load, and this one loads there."""
    body, _ = load_artifact(
        circuit().save(tmp_path / "c.json"), format="cdt_lens.circuit", version=1
    )
    assert set(body) == {
        "format", "version", "heads", "n_layers", "n_heads", "selection", "provenance",
    }  # fmt: skip
    # Written by cdt_lens 0.2.0.
    old = {
        "format": "cdt_lens.circuit", "version": 1, "heads": ["L0H1"], "n_layers": 1, "n_heads": 2,
        "selection": {"by": "magnitude", "k": 1}, "provenance": None,
        "sha256": "b6fcc87b26e3e493987124dd6a9d649ac2b41cbbb75d1f26b306729f61238676",
    }  # fmt: skip
    (tmp_path / "old.json").write_text(json.dumps(old), "utf-8")
    expected = Circuit((Head(0, 1),), 1, 2, selection={"by": "magnitude", "k": 1})
    assert_equal(Circuit.load(tmp_path / "old.json"), expected)


def test_a_graph_that_is_none_is_refused_with_its_path(tmp_path: Path):
    path = with_graph().save(tmp_path / "c.json")
    body, _ = load_artifact(path, format="cdt_lens.circuit", version=1)
    for broken in (
        {**body["graph"], "n_layers": 1},
        {**body["graph"], "edges": [["M1", "L0H0", "q", 0.5, True]]},
        {**body["graph"], "edges": [[]]},
        {"nodes": {}},
    ):
        rest = {k: v for k, v in body.items() if k not in ("format", "version")}
        save_artifact(path, {**rest, "graph": broken}, format="cdt_lens.circuit", version=1)
        with pytest.raises(ArtifactError, match="not a whole circuit file") as caught:
            Circuit.load(path)
        assert str(path) in str(caught.value)


def test_saving_over_another_circuit_replaces_it_whole(tmp_path: Path):
    path = circuit(1).save(tmp_path / "c.json")
    Circuit((Head(0, 0),), 1, 1).save(path)
    assert_equal(Circuit.load(path), Circuit((Head(0, 0),), 1, 1))


def test_damaged_files_are_refused_with_their_path(tmp_path: Path):
    path = circuit().save(tmp_path / "c.json")
    (tensors,) = tmp_path.glob("*.safetensors")
    text, payload = path.read_text("utf-8"), tensors.read_bytes()
    damages = {
        "truncated": lambda: path.write_text(text[: len(text) // 2], "utf-8"),
        "changed byte": lambda: path.write_text(text.replace('"L2H3"', '"L2H2"'), "utf-8"),
        "wrong format": lambda: path.write_text(text.replace(".circuit", ".baseline"), "utf-8"),
        "newer version": lambda: path.write_text(
            text.replace('"version": 1', '"version": 2'), "utf-8"
        ),
        "missing tensors": tensors.unlink,
        "truncated tensors": lambda: tensors.write_bytes(payload[:-4]),
        "changed tensors": lambda: tensors.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1])),
    }
    for what, damage in damages.items():
        damage()
        with pytest.raises(ArtifactError) as caught:
            Circuit.load(path)
        assert str(tmp_path) in str(caught.value), what
        path.write_text(text, "utf-8")
        tensors.write_bytes(payload)
    assert_equal(Circuit.load(path), circuit())


def test_a_full_disk_leaves_the_old_circuit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = circuit(1).save(tmp_path / "c.json")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(InputError, match="No space left"):
            circuit(2).save(path)
    assert_equal(Circuit.load(path), circuit(1))


# Another model -------------------------------------------------------------------------------------


@models(("gpt2",))
def test_results_of_another_model_are_refused_with_both_hashes(
    family, backend, tmp_path: Path, tokenizer_folder
):
    view, data = shared(family, backend, tokenizer_folder, torch.float32), examples()
    other = other_weights(family, tokenizer_folder, torch.float32)
    baseline = mean_activations(view, data, progress=False)
    scores = score_heads(view, data, baseline, progress=False)
    found = Circuit.load(scores.select(k=2).save(tmp_path / "c.json"))
    found.check_model(view)
    found.check_model(view.tl)
    loaded = HeadScores.load(scores.save(tmp_path / "s.json"))
    theirs = mean_activations(other, data, progress=False)
    quiet = {"draws": 1, "progress": False}
    for use in (
        lambda: found.check_model(other),
        lambda: circuit_faithfulness(other, found, data, theirs, **quiet),
        lambda: faithfulness_curve(other, loaded, data, theirs, **quiet),
        lambda: greedy_circuit(other, loaded, data, theirs, k=1, progress=False),
        lambda: circuit_faithfulness(view, found, data, theirs, **quiet),
        lambda: faithfulness_curve(view, loaded, data, theirs, **quiet),
    ):
        with pytest.raises(ArtifactError) as caught:
            use()
        for hashed in (baseline.provenance.model_hash, theirs.provenance.model_hash):
            assert hashed[:12] in str(caught.value)
    circuit_faithfulness(view, found, data, baseline, **quiet)


def test_a_circuit_without_provenance_fits_any_model(tokenizer_folder):
    Circuit((Head(0, 0),), 2, 4).check_model(shared("gpt2", "bridge", tokenizer_folder))


def test_numbers_of_numpy_are_saved(tmp_path: Path):
    two, three = np.int64(2), np.int64(3)
    with unchecked_types():
        made = Circuit((Head(np.int64(1), two),), two, three, selection={"k": 1})
    assert Circuit.load(made.save(tmp_path / "c.json")) == made
    with (
        unchecked_types(),
        pytest.raises(InputError, match="n_layers=2.5: expected a whole number"),
    ):
        Circuit((), 2.5, 3)


def test_near_zero_heads_take_names():
    table = torch.tensor([[0.0, 0.1], [0.2, 0.3]])
    assert near_zero_heads(table, ["L0H0"]) == near_zero_heads(table, [Head(0, 0)])
    assert near_zero_heads(table, ["L0H0"]) == (Head(0, 1),)
