"""Rankings and selections of heads, from scores made up for the purpose; and on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sample_results
from helpers.checks import assert_same_bits, unchecked_types
from torch import Tensor

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.head_scores import HeadScores, label_index
from cdt_lens.circuits.measures import heads_at
from cdt_lens.circuits.sampled import effects
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.finetuning.scopes import scope_heads
from cdt_lens.models.heads import Head
from cdt_lens.scoring.agreement import compare_scores
from cdt_lens.tasks.metrics import balanced_mean, balanced_stderr

VALUES = torch.tensor([[0.5, -2.0, 0.0], [1.5, 0.5, -0.25]])


def scores(values: Tensor = VALUES, per_example: Tensor | None = None, labels: Sequence[str] = ()):
    """Scores with these values, the same for each of four examples unless given."""
    names = tuple(labels) or ("a", "a", "b", "b")
    table = values.expand(len(names), *values.shape).clone() if per_example is None else per_example
    index = label_index(names)
    return HeadScores(
        values=values,
        stderr=balanced_stderr(table.permute(1, 2, 0).double(), index).float(),
        per_example=table,
        example_labels=names,
        direction=2.5,
        method="cdt",
        provenance=sample_results.provenance(),
    )


def names(heads: Sequence[Head]) -> str:
    return " ".join(str(head) for head in heads)


# Rankings ------------------------------------------------------------------------------------------


def test_ties_are_ranked_in_order_of_layer_and_head():
    assert names(scores().ranking("magnitude")) == "L0H1 L1H0 L0H0 L1H1 L1H2 L0H2"
    assert names(scores().ranking()) == "L1H0 L0H0 L1H1 L0H2 L1H2 L0H1"
    assert names(scores(torch.zeros(2, 2)).ranking()) == "L0H0 L0H1 L1H0 L1H1"
    many = scores(torch.ones(12, 12)).ranking()
    assert list(many) == sorted(many)


def test_heads_without_a_score_are_not_ranked():
    some = scores(torch.tensor([[torch.nan, -2.0], [0.0, torch.nan]]))
    assert names(some.ranking("magnitude")) == "L0H1 L1H0"
    assert names(some.ranking()) == "L1H0 L0H1"
    assert names(some.select(fraction=0.5).heads) == "L0H1 L1H0"
    assert names(some.select(fraction=0.25).heads) == "L1H0"
    with pytest.raises(InputError, match="0.75 of all 4 heads is 3, but only 2 have scores"):
        some.select(fraction=0.75)
    assert names(some.select(threshold=0.0, by="magnitude").heads) == "L0H1 L1H0"
    assert names(some.select(confidence=0.9, by="magnitude").heads) == "L0H1"
    assert names(some.near_zero(1).heads) == "L0H1"
    with pytest.raises(InputError, match="0 to 2"):
        some.top(3)


def test_top_is_the_beginning_of_the_ranking():
    assert names(scores().top(2, by="magnitude")) == "L0H1 L1H0"
    assert names(scores().top(2)) == "L1H0 L0H0"
    assert scores().top(0) == ()
    assert scores().top(6) == scores().ranking()
    for k in (-1, 7):
        with pytest.raises(InputError, match=f"k={k}"):
            scores().top(k)


def test_another_order_is_refused():
    with unchecked_types(), pytest.raises(InputError, match="by='size'.*signed.*magnitude"):
        scores().ranking("size")
    with unchecked_types(), pytest.raises(InputError, match="by='size'"):
        scores().select(threshold=0.5, by="size")


# Selections ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"k": 3, "by": "magnitude"}, "L0H0 L0H1 L1H0"),
        ({"k": 3}, "L0H0 L1H0 L1H1"),
        ({"fraction": 0.5, "by": "magnitude"}, "L0H0 L0H1 L1H0"),
        ({"fraction": 0.34}, "L0H0 L1H0"),
        ({"fraction": 0.49}, "L0H0 L1H0"),  # rounded down
        ({"fraction": 0.001}, "L1H0"),  # at least one
        ({"fraction": 1.0}, "L0H0 L0H1 L0H2 L1H0 L1H1 L1H2"),
        ({"threshold": 0.5, "by": "magnitude"}, "L0H0 L0H1 L1H0 L1H1"),
        ({"threshold": 0.5}, "L0H0 L1H0 L1H1"),  # the threshold itself is inside
        ({"threshold": 100.0}, ""),
        ({"threshold": -0.3, "by": "signed"}, "L0H0 L0H2 L1H0 L1H1 L1H2"),
    ],
)
def test_selections_by_rank_and_size(rule: Mapping[str, Any], expected: str):
    circuit = scores().select(**rule)
    assert names(circuit.heads) == expected
    assert (circuit.n_layers, circuit.n_heads) == (2, 3)
    assert circuit.scores is not None
    assert torch.equal(circuit.scores, VALUES)
    assert circuit.selection == {"method": "cdt", "by": "signed", **rule}
    assert circuit.provenance == scores().provenance


def test_near_zero_heads_are_the_smallest_outside_the_circuit():
    assert names(scores().near_zero(1).heads) == "L0H2"
    assert names(scores().near_zero(2).heads) == "L0H2 L1H2"
    # By the signed score L0H2 is in neither circuit of three, L0H0 in both.
    assert names(scores().near_zero(3).heads) == "L0H1 L0H2 L1H2"
    assert names(scores().near_zero(3, by="magnitude").heads) == "L0H2 L1H1 L1H2"
    assert scores().near_zero(0).heads == ()
    assert scores().near_zero(2).selection == {
        "method": "cdt", "rule": "near-zero", "k": 2, "by": "signed",
    }  # fmt: skip
    for k in (-1, 7):
        with pytest.raises(InputError, match=f"k={k}"):
            scores().near_zero(k)
    with pytest.raises(InputError, match="only 2 scored heads lie outside a circuit of 4"):
        scores().near_zero(4)


@pytest.mark.parametrize("by", ["signed", "magnitude"])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_every_use_of_a_size_takes_the_same_heads(k: int, by: Any):
    """`top`, `select` and the scope near-zero beside `near_zero`, on scores of both signs."""
    generator = torch.Generator().manual_seed(5)
    made = scores(torch.randn(3, 4, generator=generator))
    circuit = made.select(k=k, by=by)
    assert set(made.top(k, by=by)) == set(circuit)
    assert made.near_zero(k, by=by).heads == scope_heads("near-zero", circuit)
    assert made.select(k=k).heads == tuple(sorted(made.top(k)))


@pytest.mark.parametrize(("fraction", "n", "expected"), [
    (0.1, 96, 9), (0.001, 96, 0), (0.29, 100, 29), (0.1, 270, 27), (1.0, 96, 96),
])  # fmt: skip
def test_a_fraction_of_the_heads_has_one_size(fraction: float, n: int, expected: int):
    assert heads_at(fraction, n) == expected
    made = scores(torch.arange(float(n)).reshape(1, n))
    assert len(made.select(fraction=fraction)) == max(1, expected)


@pytest.mark.parametrize(
    "rule",
    [
        {}, {"k": 1, "fraction": 0.5}, {"threshold": 0.0, "confidence": 0.9},
        {"k": -1}, {"k": 7},
        {"fraction": 0.0}, {"fraction": -0.1}, {"fraction": 1.1}, {"fraction": math.nan},
        {"threshold": math.nan},
        {"confidence": 0.0}, {"confidence": 1.0}, {"confidence": 95.0}, {"confidence": math.nan},
    ],
)  # fmt: skip
def test_selections_that_mean_nothing_are_refused(rule: Mapping[str, Any]):
    with pytest.raises(InputError):
        scores().select(**rule)


def test_confident_heads_are_those_whose_interval_excludes_0():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, generator=generator)
    noise -= noise.mean()
    columns = [noise + 1.0, noise, noise - 1.0, torch.full((40,), 0.01), torch.zeros(40)]
    table = torch.stack(columns, dim=-1)[:, None]
    made = scores(table.mean(0), table, ["a", "b"] * 20)
    by_size = made.select(confidence=0.95, by="magnitude")
    assert names(by_size.heads) == "L0H0 L0H2 L0H3"
    assert names(made.select(confidence=0.95).heads) == "L0H0 L0H3"


def test_confidence_is_that_of_the_interval():
    """Against the normal interval, which Student's comes near with many examples."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(400, generator=generator)
    spread = (spread - spread.mean()) / spread.std()
    shifts = torch.tensor([0.06, 0.08, 0.09, 0.11, 0.12, 0.14])  # standard error 0.05
    table = (spread[:, None] + shifts)[:, None]
    made = scores(table.mean(0), table, ["a"] * 400)
    assert names(made.select(confidence=0.8).heads) == "L0H1 L0H2 L0H3 L0H4 L0H5"  # 1.28
    assert names(made.select(confidence=0.95).heads) == "L0H3 L0H4 L0H5"  # 1.96
    assert names(made.select(confidence=0.99).heads) == "L0H5"  # 2.58


def test_resampling_keeps_the_labels_balanced():
    """90 examples at +1 and 10 at -1.05: the balanced mean is below 0, without any spread."""
    labels = ["a"] * 90 + ["b"] * 10
    table = torch.tensor([1.0 if label == "a" else -1.05 for label in labels])[:, None, None]
    made = scores(torch.tensor([[-0.025]]), table, labels)
    assert len(made.select(confidence=0.95, by="magnitude")) == 1
    assert len(made.select(confidence=0.95)) == 0


def test_a_higher_confidence_selects_fewer_heads():
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(6, 10, 10, generator=generator) + 0.5
    made = scores(table.mean(0), table, ["a", "b", "b", "a", "b", "a"])
    first = made.select(confidence=0.9)
    assert first.selection == {"method": "cdt", "by": "signed", "confidence": 0.9}
    assert set(made.select(confidence=0.99).heads) < set(first.heads)
    assert set(first.heads) < set(made.select(confidence=0.5).heads)


def test_an_estimate_selects_by_its_own_error(tmp_path: Path):
    """Two prompts of each label are exact: the error is that of two, not of forty."""
    generator = torch.Generator().manual_seed(4)
    labels = ["a", "b"] * 20
    cheap = torch.randn(40, 1, 1, generator=generator) * 0.01
    correction = torch.full_like(cheap, torch.nan)
    correction[:4, 0, 0] = torch.tensor([0.5, 0.9, 1.5, 1.1])
    index = label_index(labels)
    spread = effects(cheap, (correction,), index).permute(1, 2, 0)
    made = replace(
        scores(torch.ones(1, 1), cheap, labels),
        values=balanced_mean(spread, index).float(),
        stderr=balanced_stderr(spread, index).float(),
        cheap=cheap.clone(),
        corrections=(correction,),
    )
    assert float(made.values) == pytest.approx(1.0, abs=0.01)
    low, high = made.interval(0.95)
    # 0.5, 1.5 and 0.9, 1.1: variances 0.5 and 0.02 of two each, so 1.08 degrees of freedom.
    error = math.sqrt(0.5 / 2 + 0.02 / 2) / 2
    assert float(high - low) / 2 == pytest.approx(10.69 * error, rel=0.02)
    assert len(made.select(confidence=0.95)) == 0
    assert len(made.select(confidence=0.5)) == 1
    assert HeadScores.load(made.save(tmp_path / "scores.json")) == made


def test_numbers_of_numpy_and_torch_select_and_are_saved(tmp_path: Path):
    with unchecked_types():
        for number, rule in enumerate(
            ({"k": np.int64(2)}, {"fraction": np.float32(0.5)}, {"threshold": VALUES.abs().mean()})
        ):
            circuit = scores().select(**rule)
            loaded = Circuit.load(circuit.save(tmp_path / f"{number}.json"))
            assert loaded.heads == circuit.heads
            assert loaded.selection == circuit.selection


# Tables and files ----------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_head():
    made = replace(scores(), stderr=VALUES.abs() / 10)
    table = made.to_dataframe()
    assert table["score"].is_monotonic_decreasing
    table = table.sort_values("head")
    assert table["head"].tolist() == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    assert table["score"].tolist() == pytest.approx(VALUES.flatten().tolist())
    assert table["stderr"].tolist() == pytest.approx((VALUES.abs() / 10).flatten().tolist())


def with_a_gap() -> HeadScores:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(7, 3, 4, generator=generator)
    table[:, 1, 2] = torch.nan
    labels = ["a", "b", "a", "b", "b", "é", "é"]
    index = torch.tensor(["abé".index(label) for label in labels])
    by_head = table.permute(1, 2, 0)
    made = scores(balanced_mean(by_head, index), table, labels)
    return replace(made, stderr=balanced_stderr(by_head, index), direction=0.1 + 0.2)


def test_round_trip_is_bit_equal(tmp_path: Path):
    made = with_a_gap()
    loaded = HeadScores.load(made.save(tmp_path / "s.json"))
    for name in ("values", "stderr", "per_example"):
        assert_same_bits(getattr(loaded, name), getattr(made, name))
    for name in ("example_labels", "direction", "method", "provenance"):
        assert getattr(loaded, name) == getattr(made, name)
    assert loaded.ranking() == made.ranking()
    assert loaded.select(confidence=0.8).heads == made.select(confidence=0.8).heads


def test_damaged_and_foreign_files_are_refused(tmp_path: Path):
    path = with_a_gap().save(tmp_path / "s.json")
    text = path.read_text("utf-8")
    path.write_text(text.replace('"direction": 0.3', '"direction": 0.4'), "utf-8")
    with pytest.raises(ArtifactError) as caught:
        HeadScores.load(path)
    assert str(path) in str(caught.value)
    path.write_text(text[: len(text) // 2], "utf-8")
    with pytest.raises(ArtifactError, match="not whole JSON"):
        HeadScores.load(path)
    circuit = with_a_gap().select(k=2).save(tmp_path / "c.json")
    with pytest.raises(ArtifactError, match="expected a cdt_lens.scores file"):
        HeadScores.load(circuit)
    with pytest.raises(InputError, match="no such file"):
        HeadScores.load(tmp_path / "none.json")


# Agreement -----------------------------------------------------------------------------------------


def test_agreement_counts_the_heads_that_both_score():
    a = torch.tensor([[1.0, 2.0, torch.nan], [4.0, 3.0, 9.0]])
    b = torch.tensor([[1.0, 4.0, 100.0], [16.0, 9.0, torch.nan]])
    found = compare_scores(scores(a), scores(b))
    assert found.spearman == pytest.approx(1.0)
    kept = np.corrcoef([1.0, 2.0, 4.0, 3.0], [1.0, 4.0, 16.0, 9.0])[0, 1]
    assert found.pearson == pytest.approx(kept)
    assert compare_scores(scores(a), scores(-a)).spearman == pytest.approx(-1.0)


def test_agreement_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"\(2, 3\) against \(3, 2\)"):
        compare_scores(scores(), scores(VALUES.T.contiguous()))


def test_scores_that_cannot_be_compared_are_refused():
    """Each gave a correlation without a word."""
    one = scores()
    other_model = replace(one, provenance=replace(one.provenance, model_hash="00" * 32))
    told = {**one.provenance.options, "direction": "strongest"}
    strongest = replace(one, provenance=replace(one.provenance, options=told))
    holed = torch.full_like(one.values, torch.nan)
    holed[0, :2] = 1.0
    for other, message in (
        (other_model, "of two models"),
        (strongest, "directions 'mean' and 'strongest'"),
        (replace(one, values=holed), "2 heads are scored by both; expected at least 3"),
    ):
        with pytest.raises(InputError, match=message):
            compare_scores(one, other)
