"""A model over several devices gives the numbers of the same model on one.

The devices are those of `helpers.two_devices`: an operation of tensors on two of them raises, as on
GPUs, and the kernels are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import split_words
from helpers.checks import assert_close, assert_same_bits, left_untouched
from helpers.tiny_models import build, prompts
from helpers.tiny_tasks import examples
from helpers.tiny_training import HEADS, QUICK, task
from helpers.two_devices import FIRST, SECOND, MixedDevices, Moved, halves, spread, two_devices
from helpers.wrapped import needs_hooked, tokenizer, wrap
from torch import Tensor, nn

import cdt_lens as cdt
from cdt_lens.circuits.edge_faithfulness import edge_faithfulness_curve
from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.models.loading import _bridge
from cdt_lens.models.offload import offload
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.direct_edges import (
    ablate_edges,
    edge_attribution_patching,
    edge_integrated_gradients,
)
from cdt_lens.scoring.one_pass import position_relevance
from cdt_lens.scoring.replay import replayed_scores
from cdt_lens.tasks.evaluate import label_prior

QUIET: dict[str, Any] = {"progress": False}
FAMILIES = ("llama", "gpt2", "gemma3", "granite")
Call = Callable[[Any, Any, Any], Any]


@pytest.fixture
def moves() -> Iterator[list[Moved]]:
    with two_devices() as found:
        yield found


def built(family: str) -> Any:
    """The tiny model of `build`; the Llama has a bias in its unembedding."""
    hf_model = build(family, torch.float32)
    if family == "llama":
        biased = nn.Linear(*hf_model.lm_head.weight.T.shape)
        biased.weight = hf_model.lm_head.weight
        biased.bias = nn.Parameter(torch.linspace(-1, 1, len(biased.weight)), requires_grad=False)
        hf_model.lm_head = biased
    return hf_model


def wrapped(hf_model: Any, folder: str) -> Any:
    model = _bridge(hf_model, tokenizer(folder), "cpu", torch.float32)
    model.cfg.model_name = "tiny"
    return model.eval()


def over_two(family: str, folder: str) -> Any:
    """The model with its blocks in turn on both devices."""
    hf_model = built(family)
    return wrapped(spread(hf_model, halves(hf_model)), folder)


# What is computed without a backward pass, or with one in the order of the model on one device.
CORE: dict[str, Call] = {
    "logits": lambda m, data, base: ModelView(m).logits(prompts()),
    "baseline": lambda m, data, base: cdt.mean_activations(m, data, mlps=True, **QUIET).hash,
    "two-ended": lambda m, data, base: _swept(m, data, base, "two-ended"),
    "official": lambda m, data, base: _swept(m, data, base, "official"),
    "decompose": lambda m, data, base: (
        cdt.decompose(
            m, data, [["L0H1", cdt.Mlp(0)], "L1H2", cdt.Node(1, 0, -1)], base, targets=["L1H0"]
        ).relevant
    ),
    "one pass": lambda m, data, base: cdt.one_pass(m, data, base, **QUIET).per_example,
    "ablation of circuits": lambda m, data, base: _curve(m, data, base, "heads"),
    "evaluate": lambda m, data, base: _table(cdt.evaluate(m, data)),
}
MORE: dict[str, Call] = {
    "shared": lambda m, data, base: _swept(m, data, base, "shared"),
    "linear": lambda m, data, base: _swept(m, data, base, "linear"),
    "ablation": lambda m, data, base: _swept(m, data, base, "ablation"),
    "estimate": lambda m, data, base: cdt.score_heads(m, data, base, exact=3, **QUIET).per_example,
    "attribution": lambda m, data, base: cdt.attribution_patching(m, data, base, **QUIET).values,
    "replay": lambda m, data, base: replayed_scores(m, data, base, **QUIET).per_example,
    "empty run of MIB": lambda m, data, base: _curve(m, data, base, "all"),
    "counterfactual": lambda m, data, base: (
        cdt.exact_ablation(
            m, data, cdt.counterfactual_baseline(m, data, examples(seed=3)), **QUIET
        ).per_example
    ),
    "prior": lambda m, data, base: label_prior(m, replace(task(), content_free=data[:1])),
    "words": lambda m, data, base: _table(cdt.evaluate(m, split_words.examples())),
    "scores of words": lambda m, data, base: _swept(m, split_words.examples(), base, "two-ended"),
    "edges": lambda m, data, base: _table(edge_attribution_patching(m, data, base, **QUIET)),
    "ablated edges": lambda m, data, base: _table(ablate_edges(m, data, base, **QUIET)),
    "edges along a path": lambda m, data, base: _table(
        edge_integrated_gradients(m, data, base, **QUIET)
    ),
    "circuits of edges": lambda m, data, base: _edges(m, data, base),
    "positions": lambda m, data, base: position_relevance(m, data, base).nan_to_num(9.0),
    "traced edges": lambda m, data, base: _table(cdt.trace_circuit(m, data, base, **QUIET)),
}
# The gradient of a frozen norm adds up what comes from three paths, in the order of the graph.
ROUNDED: dict[str, Call] = {
    slopes: lambda m, data, base, slopes=slopes: (
        cdt.one_pass(m, data, base, slopes=slopes, **QUIET).per_example
    )
    for slopes in ("linear", "direct", "gim")
}


def _swept(model: Any, data: Any, base: Any, rules: Any) -> Tensor:
    return cdt.score_heads(model, data, base, rules=rules, exact="all", **QUIET).per_example


def _curve(model: Any, data: Any, base: Any, empty: Any) -> str:
    scores = cdt.one_pass(model, data, base, **QUIET)
    return _table(cdt.faithfulness_curve(model, scores, data, base, draws=2, empty=empty, **QUIET))


def _edges(model: Any, data: Any, base: Any) -> str:
    scores = edge_attribution_patching(model, data, base, **QUIET)
    return _table(edge_faithfulness_curve(model, scores, data, base, draws=1, **QUIET))


def _table(result: Any) -> str:
    return result.to_dataframe().to_csv()


def _pair(family: str, folder: str) -> tuple[Any, Any, Any]:
    """The model over two devices and on one, and a baseline."""
    whole, model = wrapped(built(family), folder), over_two(family, folder)
    assert {p.device for p in model.parameters()} == {FIRST, SECOND}
    return model, whole, cdt.mean_activations(whole, examples(), mlps=True, **QUIET)


def _same(calls: dict[str, Call], model: Any, whole: Any, base: Any) -> None:
    for name, call in calls.items():
        found, expected = call(model, examples(), base), call(whole, examples(), base)
        if isinstance(expected, Tensor):
            assert_same_bits(found.cpu(), expected)
        else:
            assert found == expected, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_those_of_the_model_on_one_device(family, tokenizer_folder, moves):
    _same(CORE, *_pair(family, tokenizer_folder))


def test_other_methods_too(tokenizer_folder, moves):
    model, whole, base = _pair("llama", tokenizer_folder)
    _same(MORE, model, whole, base)
    for call in ROUNDED.values():
        found, expected = call(model, examples(), base), call(whole, examples(), base)
        assert_close(found, expected, atol=2e-6 * float(expected.abs().max()))


def test_no_weight_leaves_its_device_while_heads_are_scored(tokenizer_folder, moves):
    model, _, base = _pair("llama", tokenizer_folder)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    data = split_words.examples()
    cdt.evaluate(model, data)  # transformers attaches hooks of its own to a model's first run
    del moves[:]
    with left_untouched(model):
        cdt.score_heads(model, data, base, **QUIET)
        cdt.evaluate(model, data)
    to_devices = [move for move in moves if move.to in (FIRST, SECOND)]
    assert to_devices
    assert not [move for move in to_devices if move.storage in weights]


def test_the_devices_refuse_what_gpus_refuse(moves):
    first, second = torch.ones(3, device=FIRST), torch.ones(3, device=SECOND)
    for mixed in (
        lambda: first + second,
        lambda: first * torch.ones(3),
        lambda: torch.stack([first, second]),
        lambda: torch.where(first > 0, first, second),
        lambda: first[torch.tensor([0, 1], device=SECOND)],
        lambda: first.add_(second),
        lambda: first + second.sum(),
    ):
        with pytest.raises(MixedDevices):
            mixed()
    assert (first * torch.tensor(2.0)).device == first[torch.tensor([0])].device == FIRST
    leaf = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((leaf.to(SECOND) * second).sum(), leaf)
    assert gradient.device == FIRST
    leaf.register_hook(lambda gradient: gradient + second)
    with pytest.raises(MixedDevices):
        torch.autograd.grad(leaf.sum(), leaf)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_model_reads_each_weight_to_its_device(dtype, folders, moves):
    folder = folders("llama")
    whole = cdt.load_model(folder, backend="bridge", device="cpu", dtype=dtype)
    model = cdt.load_model(folder, device_map=halves(build("llama")), dtype=dtype)
    assert {p.device for p in model.blocks[1].parameters()} == {SECOND}
    assert ModelView(model).device == FIRST
    assert_same_bits(ModelView(model).logits(prompts()).cpu(), ModelView(whole).logits(prompts()))


def test_auto_is_the_model_on_the_cpu_where_no_gpu_is(folders):
    whole = cdt.load_model(folders("gpt2"), backend="bridge", device="cpu")
    model = cdt.load_model(folders("gpt2"), device_map="auto")
    assert type(model).__name__ == "TransformerBridge"
    assert_same_bits(ModelView(model).logits(prompts()), ModelView(whole).logits(prompts()))


def test_device_maps_that_cannot_be_followed_are_refused(folders, moves, tmp_path):
    folder = folders("llama")
    on_host = halves(build("llama")) | {"model.layers.0": torch.device("cpu")}
    for error, message, source, options in (
        (InputError, "one of both", folder, {"device_map": "auto", "device": "cpu"}),
        (InputError, "backend='bridge'", folder, {"device_map": "auto", "backend": "hooked"}),
        (InputError, "auto, balanced", folder, {"device_map": "all"}),
        (InputError, "device_map=.*nowhere", folder, {"device_map": {"": "nowhere"}}),
        (InputError, "GGUF.*convert", tmp_path / "a.gguf", {"device_map": "auto"}),
        (UnsupportedModelError, "1 of its 6 parts on the CPU", folder, {"device_map": on_host}),
    ):
        with pytest.raises(error, match=message):
            cdt.load_model(source, **options)


def test_an_adapter_acts_as_on_one_device_and_training_is_refused(tokenizer_folder, moves):
    model, whole, _ = _pair("llama", tokenizer_folder)
    adapter = cdt.finetune(whole, task(), heads=HEADS, **QUICK).adapter
    with adapter.applied(model), adapter.applied(whole):
        assert _table(cdt.evaluate(model, examples())) == _table(cdt.evaluate(whole, examples()))
    for scope in ("decision", "full"):
        with pytest.raises(UnsupportedModelError, match="several devices.*not be trained"):
            cdt.finetune(model, task(), heads=HEADS, scope=scope, **QUICK)
    with pytest.raises(InputError, match="on several devices"):
        offload(model)


def test_devices_without_a_device_map_are_refused(tokenizer_folder, moves):
    model = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    model.blocks[1].to(FIRST)
    with pytest.raises(UnsupportedModelError, match="no device_map.*device_map='auto'"):
        cdt.evaluate(model, examples())


@needs_hooked
def test_the_devices_of_a_hooked_transformer_are_refused(tokenizer_folder, moves):
    model = wrap("llama", "hooked", tokenizer_folder, torch.float32)
    model.blocks[1].to(FIRST)
    with pytest.raises(UnsupportedModelError, match="n_devices.*backend='bridge'"):
        cdt.evaluate(model, examples())
