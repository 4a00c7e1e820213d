"""Calls as a notebook easily makes them: the neighbouring object handed over, told in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.checks import left_untouched, unchecked_types
from helpers.shared import other_weights, shared
from helpers.tiny_models import prompts
from helpers.tiny_tasks import examples, many
from helpers.tiny_training import task as tiny_task
from helpers.wrapped import wrap

import cdt_lens as cdt
from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.decomposition.baseline import zero_baseline
from cdt_lens.interchange.graphs import circuit_from_graph, graph_from_circuit
from cdt_lens.scoring.edge_scores import score_edges
from cdt_lens.scoring.methods import random_scores
from cdt_lens.scoring.one_pass import position_relevance
from cdt_lens.tasks.prompts import build_examples

Call = Callable[[SimpleNamespace], Any]
QUIET: dict[str, Any] = {"progress": False}

# What was called, and what the message must say.
CALLS: dict[str, tuple[Call, str]] = {
    "a task for a split": (
        lambda c: cdt.one_pass(c.model, c.task, c.baseline, **QUIET),
        r"one_pass: examples: expected Examples, got Task; give a split, such as task.train",
    ),
    "a task to a sweep": (
        lambda c: cdt.score_heads(c.model, c.task, c.baseline, **QUIET), "Examples, got Task",
    ),
    "a task for means": (lambda c: cdt.mean_activations(c.model, c.task), "Examples, got Task"),
    "a task to judge": (lambda c: cdt.evaluate(c.model, c.task), "Examples, got Task"),
    "a list of examples": (
        lambda c: cdt.exact_ablation(c.model, list(c.data), c.baseline, **QUIET),
        r"got list; give .*Examples\(items, labels, name\) makes one",
    ),
    "arguments swapped": (
        lambda c: cdt.decompose(c.model, c.baseline, [["L0H0"]], c.data), "Examples, got Baseline",
    ),
    "a task to compare": (
        lambda c: cdt.compare_methods(c.model, c.data, c.task, c.baseline, **QUIET),
        "compare_methods: valid: expected Examples, got Task; give a split",
    ),
    "heads for a circuit": (
        lambda c: cdt.circuit_faithfulness(c.model, [cdt.Head(0, 0)], c.data, c.baseline, **QUIET),
        r"expected Circuit, got list; .*Circuit\(heads, n_layers, n_heads\)",
    ),
    "a circuit for scores": (
        lambda c: cdt.faithfulness_curve(c.model, c.circuit, c.data, c.baseline, **QUIET),
        "faithfulness_curve: scores: expected HeadScores, got Circuit",
    ),
    "scores to write": (
        lambda c: cdt.write_graph(c.scores, c.folder / "s.json"),
        "graph: expected Graph or Circuit, got HeadScores",
    ),
    "scores for a circuit": (
        lambda c: graph_from_circuit(c.scores), r"circuit: expected Circuit, got HeadScores; scores.select\(...\) makes one",
    ),
    "a path for a graph": (
        lambda c: circuit_from_graph("g.json"), r"graph='g.json': expected Graph; read_graph\(path\)",
    ),
    "a name for a baseline": (
        lambda c: cdt.score_heads(c.model, c.data, None, **QUIET),
        r"baseline=None: expected Baseline; mean_activations\(model, task.train\)",
    ),
    "a task for zeros": (lambda c: zero_baseline(c.model, c.task), "Examples, got Task"),
    "a number for a source": (
        lambda c: cdt.decompose(c.model, c.data, [[7]], c.baseline), "source 7: expected Head",
    ),
    "a split to train on": (
        lambda c: cdt.finetune(c.model, c.data), "finetune: task: expected Task, got Examples; load_task",
    ),
    "a split for the source": (
        lambda c: cdt.finetune(c.model, c.task, source=c.data), "finetune: source: expected Task or None, got Examples",
    ),
    "options as a dict": (
        lambda c: cdt.finetune(c.model, c.task, options={"epochs": 1}), "or give them by name: epochs=5",
    ),
    "heads as pairs": (
        lambda c: cdt.finetune(c.model, c.task, heads=[(0, 1)]), r"head \(0, 1\): expected Head\(9, 6\)",
    ),
    "scores for heads": (
        lambda c: cdt.finetune(c.model, c.task, heads=c.scores), r"heads: expected Circuit or a list or None, got HeadScores.*scores.select\(...\) makes one",
    ),
    "one head for several": (
        lambda c: cdt.finetune(c.model, c.task, heads=cdt.Head(0, 1)), r"finetune: heads: expected .* got Head; put it in a list",
    ),
    "a rule that is none": (
        lambda c: cdt.finetune(c.model, c.task, heads=["L0H1"], rule="gpa"), "rule='gpa': expected one of gap, race; did you mean 'gap'",
    ),
    "one head to score": (
        lambda c: cdt.score_heads(c.model, c.data, c.baseline, heads="L0H1"), r"put it in a list: \['L0H1'\]",
    ),
    "a circuit for circuits": (
        lambda c: circuit_metric(c.model, c.circuit, c.data, c.baseline), "circuits: expected a list, got Circuit; put",
    ),
    "heads for circuits": (
        lambda c: circuit_metric(c.model, [cdt.Head(0, 1)], c.data, c.baseline), "circuits: .*0: Value error, expected a list, got Head",
    ),
    "a circuit for sources": (
        lambda c: cdt.decompose(c.model, c.data, c.circuit, c.baseline), "sources: expected a list, got Circuit; put it in a list",
    ),
    "a list of prompts": (
        lambda c: cdt.load_task(["a b", "c d"], tokenizer=c.tokenizer), "name=.* expected text; task_from_files makes",
    ),
    "a tokenizer by name": (
        lambda c: cdt.load_task("ioi", tokenizer="gpt2"), "tokenizer='gpt2': expected PreTrainedTokenizerBase; .*from_pretrained",
    ),
    "numbers as labels": (
        lambda c: build_examples([], tokenizer=c.tokenizer, template="{text}", verbalizer={0: " a", "1": " b"}),
        "verbalizer=.*0.*should be a valid string; a label and its word are text",
    ),
    "a circuit to export": (
        lambda c: cdt.export(c.circuit, "base", c.folder / "out"), r"adapter: expected Adapter, got Circuit; finetune\(...\).adapter",
    ),
    "a circuit to compare": (
        lambda c: cdt.compare_scores(c.scores, c.circuit), "reference: expected HeadScores, got Circuit",
    ),
    "a folder for the log": (
        lambda c: cdt.finetune(c.model, c.task, heads=["L0H1"], log=c.folder, **QUIET), "log: .* is a folder; name a file",
    ),
    "heads forgotten": (
        lambda c: cdt.finetune(c.model, c.task, **QUIET), r'expected heads= .* or scope=, such as scope="full"',
    ),
    "a name of another version": (
        lambda c: cdt.report(c.circuit), "no attribute 'report'; did you mean 'render_report'",
    ),
    "other words": (
        lambda c: cdt.evaluate(c.model, c.data, c.other), r"the answer of label 'positive' is token 20",
    ),
    "one size for three": (
        lambda c: cdt.load_task("ioi", tokenizer=c.tokenizer, n=10), "n=10: expected a list or None; .*the sizes of train, valid and test",
    ),
    "no tokenizer": (
        lambda c: cdt.load_task("nusax-senti", "english", tokenizer=None),
        "tokenizer=None: expected PreTrainedTokenizerBase; .*from_pretrained",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model, data = shared("gpt2", "bridge", tokenizer_folder, torch.float32), examples()
    baseline = cdt.mean_activations(model, data, **QUIET)
    scores = cdt.one_pass(model, data, baseline, **QUIET)
    folder: Path = tmp_path_factory.mktemp("calls")
    task = tiny_task()
    ids = dict(zip(task.verbalizer_ids, [40, 20, 30], strict=True))
    return SimpleNamespace(
        model=model, data=data, task=task, baseline=baseline, scores=scores,
        circuit=scores.select(k=2), folder=folder, tokenizer=model.tokenizer, other=replace(task, verbalizer_ids=ids),
    )  # fmt: skip


@pytest.mark.parametrize("mistake", CALLS)
def test_the_wrong_object_is_told_with_the_fix(mistake: str, made: SimpleNamespace):
    call, told = CALLS[mistake]
    with unchecked_types(), pytest.raises(cdt.InputError, match=told) as caught:
        call(made)
    assert "\n" not in str(caught.value)
    assert not list(made.folder.iterdir())


def _with_ids(data: cdt.Examples, **changes: tuple[int, ...]) -> cdt.Examples:
    """The same examples, with other ids in the last of them."""
    return replace(data, items=(*data.items[:-1], replace(data.items[-1], **changes)))


# Every way to hand examples to a model.
READS_EXAMPLES: dict[str, Callable[[Any, cdt.Examples, Any, Any], Any]] = {
    "mean_activations": lambda m, e, b, t: cdt.mean_activations(m, e, **QUIET),
    "zero_baseline": lambda m, e, b, t: zero_baseline(m, e),
    "counterfactual_baseline": lambda m, e, b, t: cdt.counterfactual_baseline(m, e, e),
    "counterfactual pairs": lambda m, e, b, t: cdt.counterfactual_baseline(m, t.train, e),
    "decompose": lambda m, e, b, t: cdt.decompose(m, e, [["L0H0"]], b),
    "score_heads": lambda m, e, b, t: cdt.score_heads(m, e, b, **QUIET),
    "one_pass": lambda m, e, b, t: cdt.one_pass(m, e, b, **QUIET),
    "random_scores": lambda m, e, b, t: random_scores(m, e, b),
    "score_edges": lambda m, e, b, t: score_edges(m, e, b, **QUIET),
    "circuit_metric": lambda m, e, b, t: circuit_metric(m, [["L0H0"]], e, b, **QUIET),
    "attention_view": lambda m, e, b, t: cdt.attention_view(m, e, ["L0H0"]),
    "position_relevance": lambda m, e, b, t: position_relevance(m, e, b),
    "evaluate": lambda m, e, b, t: cdt.evaluate(m, e),
    "calibrate": lambda m, e, b, t: cdt.calibrate(m, replace(t, content_free=e)),
    "finetune": lambda m, e, b, t: cdt.finetune(m, replace(t, valid=e), heads=["L0H1"], **QUIET),
    "compare_methods": lambda m, e, b, t: cdt.compare_methods(m, t.train, e, b, **QUIET),
}  # fmt: skip
FOREIGN_IDS = {
    "a prompt beyond the vocabulary": {"tokens": (5, 500)},
    "a negative id": {"tokens": (5, -1)},
    "an answer beyond the vocabulary": {"answers": (128,)},
    "a competitor beyond the vocabulary": {"others": (5000,)},
}


@pytest.mark.parametrize("what", FOREIGN_IDS)
@pytest.mark.parametrize("function", READS_EXAMPLES)
def test_ids_that_the_model_does_not_have_are_refused(
    function: str, what: str, made: SimpleNamespace
):
    data = _with_ids(made.task.train, **FOREIGN_IDS[what])
    with unchecked_types(), pytest.raises(cdt.InputError, match="token id .* has the ids 0 to 127"):
        READS_EXAMPLES[function](made.model, data, made.baseline, made.task)


TAKES_HEADS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "circuit_metric": lambda m, c, s, h: circuit_metric(m, [h], s.data, s.own, **QUIET),
    "decompose": lambda m, c, s, h: cdt.decompose(m, s.data, [h], s.own),
    "decompose targets": lambda m, c, s, h: cdt.decompose(m, s.data, [["L0H0"]], s.own, targets=h),
    "score_heads": lambda m, c, s, h: cdt.score_heads(m, s.data, s.own, heads=h, **QUIET),
    "exact_ablation": lambda m, c, s, h: cdt.exact_ablation(m, s.data, s.own, heads=h, **QUIET),
    "attention_view": lambda m, c, s, h: cdt.attention_view(m, s.data, h),
    "token_relevance": lambda m, c, s, h: cdt.token_relevance(m, s.data, h, s.own),
    "finetune": lambda m, c, s, h: cdt.finetune(m, s.task, heads=h, epochs=1, **QUIET),
}  # fmt: skip


@pytest.mark.parametrize("function", TAKES_HEADS)
def test_a_circuit_of_another_model_is_refused(
    function: str, made: SimpleNamespace, tokenizer_folder: str
):
    other = other_weights("gpt2", tokenizer_folder, torch.float32)
    here = SimpleNamespace(
        data=made.data[:2], task=made.task, own=cdt.mean_activations(other, made.data, **QUIET)
    )
    with unchecked_types():
        with pytest.raises(cdt.ArtifactError, match="this circuit was made with model"):
            TAKES_HEADS[function](other, made, here, made.circuit)
        with pytest.raises(cdt.InputError, match="the model has layers 0-1 of heads 0-3"):
            TAKES_HEADS[function](other, made, here, ["L0H9"])
        TAKES_HEADS[function](other, made, here, list(made.circuit.heads))


def test_a_baseline_of_another_model_is_refused_everywhere(
    made: SimpleNamespace, tokenizer_folder: str
):
    other = other_weights("gpt2", tokenizer_folder, torch.float32)
    takes = {"decompose", "score_heads", "one_pass", "random_scores", "circuit_metric",
             "position_relevance", "score_edges", "compare_methods"}  # fmt: skip
    for name in sorted(takes):
        with unchecked_types(), pytest.raises(cdt.ArtifactError, match="this baseline was made"):
            READS_EXAMPLES[name](other, made.task.valid, made.baseline, made.task)


def test_a_circuit_is_a_set_of_heads(made: SimpleNamespace):
    """By name too, and wherever heads are asked for."""
    circuit = made.circuit
    assert list(circuit) == list(circuit.heads)
    inside, outside = circuit.heads[0], circuit.complement[0]
    assert inside in circuit and str(inside) in circuit
    assert outside not in circuit and str(outside) not in circuit
    with pytest.raises(cdt.InputError, match="expected the form L9H6"):
        assert "the first" in circuit
    alike = (made.model, [circuit, circuit.heads], many(), made.baseline)
    first, second = circuit_metric(*alike, **QUIET).tolist()
    assert first == second


def test_sources_go_by_name_too(made: SimpleNamespace):
    named = cdt.decompose(made.model, made.data, ["L0H1", ["L1H2", cdt.Head(0, 0)]], made.baseline)
    heads = cdt.decompose(
        made.model, made.data, [cdt.Head(0, 1), [cdt.Head(1, 2), cdt.Head(0, 0)]], made.baseline
    )
    assert torch.equal(named.relevant, heads.relevant)


def test_a_checkpoint_that_cannot_be_leaves_the_model_as_it_was(
    tokenizer_folder: str, made: SimpleNamespace, tmp_path: Path
):
    """LoRA puts layers of peft's into the model: none may stay behind."""
    model = wrap("gpt2", "bridge", tokenizer_folder, torch.float32)
    model(prompts(1, 3))  # at its first run a bridge attaches hooks of its own, for good
    with unchecked_types(), left_untouched(model), pytest.raises(cdt.InputError):
        cdt.finetune(model, made.task, scope="lora", checkpoint=tmp_path, epochs=1, **QUIET)


def test_the_norms_are_recorded_as_what_was_trained(tokenizer_folder: str, made: SimpleNamespace):
    model = wrap("gpt2", "bridge", tokenizer_folder, torch.float32)
    tuned = cdt.finetune(model, made.task, scope="norms", norms="none", epochs=1, **QUIET)
    assert tuned.options["norms"] == "all"
    refused = pytest.raises(cdt.InputError, match="keep_frozen='False': expected true or false")
    with unchecked_types(), refused:
        cdt.TrainingOptions().changed(keep_frozen="False")
