"""The label-balanced mean against loops over single positions; the other references; on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.checks import assert_close, assert_same_bits, left_untouched, unchecked_types
from helpers.shared import models, other_weights, shared
from helpers.tiny_models import Float64Throughout, build
from helpers.tiny_tasks import GOLD, LABELS, LENGTHS, examples
from helpers.wrapped import wrap
from torch import Tensor

from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.core.artifacts import content_hash, load_artifact
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.decomposition.baseline import (
    Baseline,
    counterfactual_baseline,
    mean_activations,
    zero_baseline,
)
from cdt_lens.decomposition.decompose import decompose
from cdt_lens.models.heads import Head, Mlp
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.task import Examples

SLOTS = ("answer", "pooled", "right", "left")


def z_of(view: ModelView, tokens: Sequence[int]) -> Tensor:
    """z of one prompt, run alone and without padding: [layer, pos, head, d_head]."""
    trace = view.run(torch.tensor([tokens]), [("z", layer) for layer in range(view.n_layers)])
    return torch.stack([trace["z", layer][0] for layer in range(view.n_layers)])


def slot(kind: str, position: int, length: int) -> int:
    if kind == "answer":
        return 1 if position == length - 1 else 0
    return {"pooled": 0, "right": length - 1 - position, "left": position}[kind]


def by_hand(view: ModelView, data: Examples, kind: str) -> dict[int, Tensor]:
    """For each slot: the mean over labels of the per-label means, one position at a time."""
    seen: dict[tuple[int, str], list[Tensor]] = {}
    for item in data:
        z = z_of(view, item.tokens)
        for position in range(len(item.tokens)):
            key = (slot(kind, position, len(item.tokens)), item.label)
            seen.setdefault(key, []).append(z[:, position])
    means: dict[int, Tensor] = {}
    for number in {key[0] for key in seen}:
        labels = [torch.stack(seen[key]).mean(0) for key in seen if key[0] == number]
        means[number] = sum(labels) / len(labels)
    return means


@models(("gpt2", "llama", "gemma3"))
@pytest.mark.parametrize("kind", SLOTS)
def test_the_mean_is_label_balanced(family, backend, kind, tokenizer_folder):
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        data = examples()
        assert sorted(data.counts.values()) == [1, 2, 3]
        expected = by_hand(view, data, kind)
        if kind == "right":  # one more, for prompts longer than these: the mean of all positions
            expected[len(expected)] = by_hand(view, data, "pooled")[0]
        for batch_size in (1, 4, 100):
            found = mean_activations(
                view, data, positions=kind, batch_size=batch_size, progress=False
            )
            assert found.means.shape[1] == len(expected)
            for number, mean in expected.items():
                assert_close(found.means[:, number], mean, atol=1e-7)  # kept as float32


@pytest.mark.parametrize("kind", SLOTS)
def test_order_and_batches_change_nothing(kind, tokenizer_folder):
    with Float64Throughout():
        view, data = shared("gpt2", "bridge", tokenizer_folder), examples(lowest=0)
        options = {"positions": kind, "progress": False}
        expected = mean_activations(view, data, batch_size=6, **options).means
        shuffled = replace(data, items=tuple(data.items[i] for i in (3, 0, 5, 1, 4, 2)))
        for other, size in ((data, 1), (shuffled, 6), (shuffled, 4)):
            found = mean_activations(view, other, batch_size=size, **options).means
            assert_close(found, expected, atol=1e-7)


def test_a_label_with_more_examples_does_not_pull_the_mean(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    data = examples((5, 6), ("positive", "negative"))
    repeated = replace(data, items=(data[0],) * 7 + (data[1],))
    expected = mean_activations(view, data, progress=False).means
    assert_close(mean_activations(view, repeated, progress=False).means, expected, atol=1e-6)


def test_a_slot_that_a_label_never_reaches_is_a_mean_over_the_others(tokenizer_folder):
    """Position 5 from the right exists for "positive" only, position 3 for both."""
    view = shared("gpt2", "bridge", tokenizer_folder)
    data = examples((6, 4, 6), ("positive", "negative", "positive"))
    means = mean_activations(view, data, positions="right", progress=False).means
    z = [z_of(view, item.tokens) for item in data]
    assert_close(means[:, 5], (z[0][:, 0] + z[2][:, 0]) / 2, atol=1e-6)
    positive = (z[0][:, 2] + z[2][:, 2]) / 2
    assert_close(means[:, 3], (positive + z[1][:, 0]) / 2, atol=1e-6)


@pytest.mark.parametrize("kind", SLOTS)
def test_each_position_of_a_batch_gets_the_mean_of_its_slot(kind, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = mean_activations(view, data, positions=kind, progress=False)
    for batch in data.batches(4):
        values = baseline.for_batch(view, batch)
        for layer in range(view.n_layers):
            at_layer = values(layer)
            for row, length in enumerate(batch.lengths.tolist()):
                for position in range(length):
                    expected = baseline.means[layer, slot(kind, position, length)]
                    assert torch.equal(at_layer[row, position], expected.to(at_layer.dtype))


def test_longer_prompts_from_the_right_use_the_mean_of_all_positions(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    short = examples((3, 4), ("positive", "negative"))
    baseline = mean_activations(view, short, positions="right", progress=False)
    pooled = mean_activations(view, short, positions="pooled", progress=False).means[0, 0]
    (batch,) = examples((7,), ("positive",)).batches(1)
    values = baseline.for_batch(view, batch)(0)[0]
    assert_close(values[:3], pooled.expand(3, *pooled.shape), atol=1e-6)
    for from_right in range(4):
        expected = baseline.means[0, from_right].to(values.dtype)
        assert torch.equal(values[6 - from_right], expected)


def test_longer_templated_prompts_are_refused(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    baseline = mean_activations(
        view, examples((4,), ("positive",)), positions="left", progress=False
    )
    (batch,) = examples((5,), ("positive",)).batches(1)
    with pytest.raises(InputError, match="had 4 positions, these have 5"):
        baseline.for_batch(view, batch)


def test_the_zero_baseline_is_0_everywhere(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    (batch,) = data.batches(10)
    values = zero_baseline(view, data).for_batch(view, batch)(1)
    shape = (*batch.tokens.shape, view.n_heads, view.d_head)
    assert torch.equal(values.expand(shape), torch.zeros(shape, dtype=view.dtype))


@models(("gpt2", "llama"))
def test_the_counterfactual_baseline_is_the_paired_prompts_z(family, backend, tokenizer_folder):
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        data, pairs = examples(), examples(seed=9, name="tiny/pairs")
        baseline = counterfactual_baseline(view, data, pairs)
        partner = {item.tokens: pair.tokens for item, pair in zip(data, pairs, strict=True)}
        shuffled = replace(data, items=tuple(data.items[i] for i in (3, 0, 5, 1)))
        for split in (data, shuffled, data[2:]):  # any part, in any order
            for batch in split.batches(4):  # longest first
                values = baseline.for_batch(view, batch)
                for row, index in enumerate(batch.index):
                    z = z_of(view, partner[split[index].tokens])
                    for layer in range(view.n_layers):
                        assert_close(values(layer)[row, : z.shape[1]], z[layer], atol=1e-12)


def test_pairs_that_do_not_fit_are_refused(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    pairs = examples(seed=9)
    with pytest.raises(InputError, match="6 examples and 3 counterfactual"):
        counterfactual_baseline(view, data, pairs[:3])
    longer = examples(tuple(length + 1 for length in LENGTHS), GOLD)
    with pytest.raises(InputError, match="9 tokens.* 10"):
        counterfactual_baseline(view, data, longer)
    twice = replace(data, items=(data[0], data[0]))
    with pytest.raises(InputError, match="twice"):
        counterfactual_baseline(view, twice, examples((9, 9), GOLD[:2], seed=9))
    counterfactual_baseline(view, twice, replace(pairs, items=(pairs[0], pairs[0])))
    with pytest.raises(InputError, match="no counterfactual prompt"):
        score_heads(
            view, examples(seed=3), counterfactual_baseline(view, data, pairs), progress=False
        )


def test_wrong_input_is_refused(tokenizer_folder):
    view, empty = shared("gpt2", "bridge", tokenizer_folder), Examples((), LABELS, "tiny/none")
    with pytest.raises(InputError, match="tiny/none"):
        mean_activations(view, empty, progress=False)
    with pytest.raises(InputError, match="tiny/none"):
        counterfactual_baseline(view, empty, empty)
    with unchecked_types(), pytest.raises(InputError, match="positions='middle'.*answer"):
        mean_activations(view, examples(), positions="middle", progress=False)


def test_a_baseline_of_another_shape_is_refused(tokenizer_folder):
    view, other = (shared(name, "bridge", tokenizer_folder) for name in ("gpt2", "gemma3"))
    baseline = mean_activations(other, examples(), progress=False)
    with pytest.raises(InputError, match=r"3 layers of 4 heads.*2 of 4 of 16.*mean_activations"):
        baseline.for_batch(view, next(examples().batches(6)))


def test_a_baseline_of_other_weights_is_refused_with_both_hashes(tokenizer_folder):
    """The same shape, another model: its means would be wrong without a sign of it."""
    view, other = (
        shared("gpt2", "bridge", tokenizer_folder),
        other_weights("gpt2", tokenizer_folder),
    )
    data, heads = examples(), [Head(0, 1)]
    baseline = mean_activations(other, data, progress=False)
    mine = mean_activations(view, data, progress=False)
    for use in (
        lambda: score_heads(view, data, baseline, progress=False),
        lambda: decompose(view, data, [heads], baseline),
        lambda: circuit_metric(view, [heads], data, baseline, progress=False),
    ):
        with pytest.raises(ArtifactError) as caught:
            use()
        assert baseline.provenance.model_hash[:12] in str(caught.value)
        assert mine.provenance.model_hash[:12] in str(caught.value)


def test_a_mean_of_no_position_is_refused_not_0(tokenizer_folder):
    """All prompts of one token: nothing is known about the positions before the answer."""
    view = shared("gpt2", "bridge", tokenizer_folder)
    single = examples((1, 1), ("positive", "negative"))
    with pytest.raises(InputError, match="before the answer"):
        mean_activations(view, single, progress=False)
    mean_activations(view, single, positions="pooled", progress=False)


@pytest.mark.parametrize("kind", [*SLOTS, "zero"])
def test_round_trip_is_bit_equal(kind, tmp_path: Path, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    if kind == "zero":
        baseline = zero_baseline(view, data)
    else:
        baseline = mean_activations(view, data, positions=kind, progress=False)
    with left_untouched(view.tl):
        loaded = Baseline.load(baseline.save(tmp_path / "b.json"))
    assert loaded.kind == kind
    assert loaded.provenance == baseline.provenance
    assert_same_bits(loaded.means, baseline.means)
    scores = [
        score_heads(view, data, b, rules="linear", progress=False) for b in (baseline, loaded)
    ]
    assert_same_bits(scores[0].values, scores[1].values)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    path = mean_activations(view, examples(), progress=False).save(tmp_path / "b.json")
    (tensors,) = tmp_path.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(ArtifactError) as caught:
        Baseline.load(path)
    assert str(tensors) in str(caught.value)
    path.write_text(path.read_text().replace("cdt_lens.baseline", "cdt_lens.circuit"))
    with pytest.raises(ArtifactError, match="expected a cdt_lens.baseline file"):
        Baseline.load(path)
    with pytest.raises(InputError, match="no such file"):
        Baseline.load(tmp_path / "none.json")


def test_a_counterfactual_baseline_is_not_a_file(tmp_path: Path, tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    with pytest.raises(InputError, match="prompts, not means"):
        counterfactual_baseline(view, examples(), examples()).save(tmp_path / "b.json")
    assert list(tmp_path.iterdir()) == []


def test_the_provenance_says_where_the_means_come_from(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    found = mean_activations(view, data, positions="right", progress=False).provenance
    assert (found.task, found.task_hash) == (data.name, data.hash)
    assert found.examples == {"positive": 3, "neutral": 1, "negative": 2}
    assert found.options["kind"] == "right"
    assert found.model == "tiny-gpt2"


# MLPs -----------------------------------------------------------------------------------------------


def mlp_outputs(view: ModelView, tokens: Sequence[int]) -> Tensor:
    """What each MLP adds to the stream, by TransformerLens' own cache: [layer, pos, d_model]."""
    more = {"use_cache": False} if view.is_bridge else {}
    with torch.no_grad():
        _, cache = view.tl.run_with_cache(torch.tensor([tokens]), **more)
    names = [f"blocks.{layer}" for layer in range(view.n_layers)]
    return torch.stack(
        [
            (cache[f"{name}.hook_resid_post"] - cache[f"{name}.hook_resid_pre"]
             - cache[f"{name}.hook_attn_out"])[0]
            for name in names
        ]
    )  # fmt: skip


@models(("gpt2", "pythia", "gemma2"))
@pytest.mark.parametrize("kind", ["answer", "right"])
def test_the_mean_of_an_mlp_is_of_what_it_adds_and_label_balanced(
    family, backend, kind, tokenizer_folder
):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        found = mean_activations(
            view, data, positions=kind, mlps=True, batch_size=4, progress=False
        )
        seen: dict[tuple[int, str], list[Tensor]] = {}
        for item in data:
            out = mlp_outputs(view, item.tokens)
            for position in range(len(item.tokens)):
                key = (slot(kind, position, len(item.tokens)), item.label)
                seen.setdefault(key, []).append(out[:, position])
        plain = mean_activations(view, data, positions=kind, batch_size=4, progress=False)
        for number in {key[0] for key in seen}:
            labels = [torch.stack(seen[key]).mean(0) for key in seen if key[0] == number]
            assert_close(found.mlp_means[:, number], sum(labels) / len(labels), atol=1e-6)
        assert found.mlp_means.shape == (view.n_layers, plain.means.shape[1], view.d_model)
        assert_same_bits(found.means, plain.means)
        for batch in data.batches(4):
            values = found.mlps_for_batch(view, batch)
            for row, length in enumerate(batch.lengths.tolist()):
                for position in range(length):
                    expected = found.mlp_means[1, slot(kind, position, length)]
                    assert_close(values(1)[row, position], expected, atol=0)


def test_means_of_mlps_are_saved_and_change_the_hash(tmp_path: Path, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    plain = mean_activations(view, data, progress=False)
    with_mlps = mean_activations(view, data, mlps=True, progress=False)
    assert with_mlps.hash != plain.hash
    loaded = Baseline.load(with_mlps.save(tmp_path / "b.json"))
    assert_same_bits(loaded.mlp_means, with_mlps.mlp_means)
    assert loaded.hash == with_mlps.hash
    assert_same_bits(loaded.embed_means, with_mlps.embed_means)
    assert replace(with_mlps, mlp_means=None).hash == plain.hash
    other = replace(with_mlps, mlp_means=with_mlps.mlp_means + 1)
    assert other.hash not in (plain.hash, with_mlps.hash)
    # A baseline of an earlier version has no mean embeddings, and the runs made with it go on.
    assert replace(with_mlps, embed_means=None).hash == with_mlps.hash


@models(("gpt2", "llama"))
@pytest.mark.parametrize("kind", ["answer", "right"])
def test_the_mean_of_the_embeddings_is_of_the_tokens_alone(family, backend, kind, tokenizer_folder):
    """Rows of the embedding matrix, label-balanced; positions are no part of it."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        found = mean_activations(
            view, data, positions=kind, mlps=True, batch_size=4, progress=False
        )
        table = build(family).get_input_embeddings().weight
        seen: dict[tuple[int, str], list[Tensor]] = {}
        for item in data:
            for position, token in enumerate(item.tokens):
                key = (slot(kind, position, len(item.tokens)), item.label)
                seen.setdefault(key, []).append(table[token])
        for number in {key[0] for key in seen}:
            labels = [torch.stack(seen[key]).mean(0) for key in seen if key[0] == number]
            assert_close(found.embed_means[number], sum(labels) / len(labels), atol=1e-6)
        pairs = examples(seed=9, name="tiny/pairs")
        paired = counterfactual_baseline(view, data, pairs)
        for batch in data.batches(4):
            for row, index in enumerate(batch.index):
                expected = table[list(pairs[index].tokens)]
                values = paired.embedding_for_batch(view, batch)[row, : len(expected)]
                assert_close(values, expected, atol=1e-12)


def test_files_without_mlps_load_with_the_hash_that_they_had(tmp_path: Path, tokenizer_folder):
    """As every file was before MLPs had means."""
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    plain = mean_activations(view, data, progress=False)
    path = plain.save(tmp_path / "b.json")
    _, tensors = load_artifact(path, format="cdt_lens.baseline", version=1)
    assert set(tensors) == {"means"}
    loaded = Baseline.load(path)
    assert loaded.mlp_means is None
    told = plain.provenance
    digest = hashlib.sha256(plain.means.numpy().tobytes()).hexdigest()
    assert loaded.hash == content_hash(["answer", told.model_hash, told.task_hash, digest, []])
    with pytest.raises(InputError, match=r"no values for MLPs.*mlps=True"):
        decompose(view, data, [Mlp(0)], loaded)


@models(("gpt2", "gemma2"))
def test_mlps_of_the_zero_and_the_counterfactual_baseline(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        pairs = examples(seed=9, name="tiny/pairs")
        zero, paired = zero_baseline(view, data), counterfactual_baseline(view, data, pairs)
        for batch in data.batches(4):
            assert not bool(zero.mlps_for_batch(view, batch)(1).any())
            values = paired.mlps_for_batch(view, batch)(1)
            for row, index in enumerate(batch.index):
                out = mlp_outputs(view, pairs[index].tokens)[1]
                assert_close(values[row, : len(out)], out, atol=1e-12)
        itself = counterfactual_baseline(view, data, data)
        found = decompose(view, data, [Mlp(0), (Mlp(1), Head(0, 1))], itself)
        assert_close(found.relevant, torch.zeros_like(found.relevant), atol=1e-12)


def test_an_mlp_beyond_the_finite_range_has_no_mean(tokenizer_folder):
    """The last MLP is seen by no z, so z says nothing of it."""
    model = wrap("gpt2", "bridge", tokenizer_folder, torch.float32)
    model.blocks[1].mlp.out.weight.detach().mul_(1e38)
    model.blocks[1].mlp.out.weight.detach().clamp_(-3e38, 3e38)
    view, data = ModelView(model), examples()
    mean_activations(view, data, progress=False)
    with pytest.raises(InputError, match=r"an MLP's output is not finite.*float32"):
        mean_activations(view, data, mlps=True, progress=False)
