"""The reference implementation against Hugging Face models, against hand-worked numbers and
against the official CD-T code's numbers."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product as product_of
from types import SimpleNamespace

import pytest
import torch
from helpers.places import FIXTURES
from helpers.reference import (
    MLP,
    OFFICIAL,
    Decomposition,
    Linear,
    Norm,
    Pair,
    ReferenceRules,
    Source,
    activation,
    add_bias,
    decompose,
    decompose_hooked,
    norm,
    product,
    read_model,
    run_block,
    run_mlp,
    sign,
)
from helpers.tiny_models import D_MODEL, EXPERTS, FAMILIES, Float64Throughout, build, prompts
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

THROUGH = ReferenceRules("through", "through", "through", "through", "irrelevant")
LINEAR = ReferenceRules("frozen", "frozen", "frozen", "half", "irrelevant")
RULES = {
    "default": ReferenceRules(),
    "official": OFFICIAL,
    "through": THROUGH,
    "linear": LINEAR,
    "norm-through": ReferenceRules(norm="through", attention="frozen"),
    "attention-through": ReferenceRules(attention="through", product="half"),
    "activation-frozen": ReferenceRules(activation="frozen", norm="through"),
    "averaged": ReferenceRules("through", "half", "averaged", "half", "irrelevant"),
    "gate": ReferenceRules("through", "half", "through", "gate", "irrelevant"),
    "linear-with-sign": replace(LINEAR, bias="proportional", sign=True),
}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_rule = pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())


@cache
def tiny(family: str) -> PreTrainedModel:
    return build(family)


def assert_close(actual: Tensor, expected: Tensor, *, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# Running the Hugging Face model -------------------------------------------------------------------


def head_shape(model: PreTrainedModel) -> tuple[int, int]:
    """n_heads, d_head."""
    n_heads = model.config.num_attention_heads
    return n_heads, _writers(model)[0].weight.numel() // model.config.hidden_size // n_heads


def random_baseline(model: PreTrainedModel, tokens: Tensor, *, seed: int = 0) -> Tensor:
    shape = (model.config.num_hidden_layers, *tokens.shape, *head_shape(model))
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)


def random_sources(model: PreTrainedModel, *, seed: int) -> list[Source]:
    """Three distinct heads, one of them at a single position."""
    n_layers, n_heads = model.config.num_hidden_layers, head_shape(model)[0]
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    first, *others = random.Random(seed).sample(heads, 3)
    return [(*first, seed % 5), *((layer, head, None) for layer, head in others)]


def _writers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Each layer's W_O: what it reads is z, heads side by side."""
    family = model.config.model_type
    if family == "opt":
        return [layer.self_attn.out_proj for layer in model.model.decoder.layers]
    if hasattr(model, "transformer"):
        path = {"gptj": "attn.out_proj", "gpt_neo": "attn.attention.out_proj"}
        return [
            layer.get_submodule(path.get(family, "attn.c_proj")) for layer in model.transformer.h
        ]
    if hasattr(model, "gpt_neox"):
        return [layer.attention.dense for layer in model.gpt_neox.layers]
    return [layer.self_attn.o_proj for layer in model.model.layers]


@contextmanager
def _ablated(model: PreTrainedModel, sources: Sequence[Source], baseline: Tensor) -> Iterator[None]:
    """The model with z of the source heads replaced by the baseline on its way into W_O."""
    n_heads, d_head = head_shape(model)

    def replace_heads(layer: int):
        def hook(module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone().unflatten(-1, (n_heads, d_head))
            for source_layer, head, position in sources:
                where = slice(None) if position is None else position
                if source_layer == layer:
                    z[:, where, head] = baseline[layer][:, where, head]
            return (z.flatten(-2),)

        return hook

    handles = [
        writer.register_forward_pre_hook(replace_heads(layer))
        for layer, writer in enumerate(_writers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def true_logits(model: PreTrainedModel, tokens: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
    with Float64Throughout():
        return model(tokens, use_cache=False).logits


@contextmanager
def _inputs_and_outputs(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, tuple]]:
    seen: dict[str, tuple] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: (args[0], output)})
        )
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hugging_face_attention(
    model: PreTrainedModel, tokens: Tensor, layer: int, q: Pair, k: Pair, v: Tensor
) -> Float[Tensor, "batch pos head d_head"]:
    """The family's own rotary and attention functions, and the mask of its own run, on rel q,
    rel k (QK-normed by the scale of the full q and k) and v."""
    block = (model.gpt_neox if hasattr(model, "gpt_neox") else model.model).layers[layer]
    module = block.attention if hasattr(block, "attention") else block.self_attn
    code = sys.modules[type(module).__module__]
    given: dict[str, object] = {}
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    true_logits(model, tokens)
    handle.remove()
    rel_q, rel_k = (
        frozen_qk_norm(parts, getattr(module, name, None), model.config).transpose(1, 2)
        for name, parts in (("q_norm", q), ("k_norm", k))
    )
    with Float64Throughout():
        if getattr(module, "use_rope", True):
            rel_q, rel_k = code.apply_rotary_pos_emb(rel_q, rel_k, *given["position_embeddings"])
        z, _ = code.eager_attention_forward(
            module,
            rel_q,
            rel_k,
            v.transpose(1, 2),
            given["attention_mask"],
            scaling=module.scaling,
            softcap=getattr(module, "attn_logit_softcapping", None),
        )
    return z


def frozen_qk_norm(parts: Pair, module: torch.nn.Module | None, config: object) -> Tensor:
    if module is None:
        return parts.rel
    weight = module.weight + 1 if config.model_type.startswith("gemma") else module.weight
    mean_square = parts.full.square().mean(-1, keepdim=True)
    return parts.rel * weight / torch.sqrt(mean_square + config.rms_norm_eps)


# Against Hugging Face -----------------------------------------------------------------------------


@every_family
@every_rule
def test_without_sources_everything_is_irrelevant(family: str, rules: ReferenceRules):
    model, tokens = tiny(family), prompts()
    result = decompose(model, tokens, [], random_baseline(model, tokens), rules)
    assert not result.rel_logits.any()
    assert not any(part.any() for part in result.rel.values())
    assert_close(result.irrel_logits, true_logits(model, tokens))


@every_family
@every_rule
@pytest.mark.parametrize("seed", range(3))
def test_the_parts_add_up_to_the_model(family: str, rules: ReferenceRules, seed: int):
    model, tokens = tiny(family), prompts(seed=seed)
    baseline = random_baseline(model, tokens, seed=seed)
    result = decompose(model, tokens, random_sources(model, seed=seed), baseline, rules)
    assert result.rel_logits.any()
    assert_close(result.rel_logits + result.irrel_logits, true_logits(model, tokens))


@pytest.mark.parametrize(
    ("family", "seed"), [*product_of(FAMILIES, range(4)), *((family, 0) for family in EXPERTS)]
)
def test_everything_through_is_ablation(family: str, seed: int):
    model, tokens = tiny(family), prompts(seed=seed)
    baseline = random_baseline(model, tokens, seed=seed)
    sources = random_sources(model, seed=seed)
    with Float64Throughout():  # experts are Hugging Face's own module
        result = decompose(model, tokens, sources, baseline, THROUGH)
    with _ablated(model, sources, baseline):
        expected = true_logits(model, tokens)
    assert (expected - true_logits(model, tokens)).abs().max() > 0.1
    assert_close(result.irrel_logits, expected)


@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama", "gemma2", "granite"])
def test_everything_through_is_ablation_of_an_mlp_and_a_head(family: str):
    model, tokens = tiny(family), prompts()
    baseline = random_baseline(model, tokens)
    mean = 0.5 * torch.ones(*tokens.shape, D_MODEL, dtype=torch.float64)
    result = decompose(model, tokens, [(1, 0, None)], baseline, THROUGH, {0: mean})
    body = next(
        getattr(model, name)
        for name in ("transformer", "gpt_neox", "model")
        if hasattr(model, name)
    )
    block = (body.h if family == "gpt2" else body.layers)[0]
    adds = block.post_feedforward_layernorm if family == "gemma2" else block.mlp
    written = mean / getattr(model.config, "residual_multiplier", 1.0)
    handle = adds.register_forward_hook(lambda *_: written)
    try:
        with _ablated(model, [(1, 0, None)], baseline):
            expected = true_logits(model, tokens)
    finally:
        handle.remove()
    assert (expected - true_logits(model, tokens)).abs().max() > 0.1
    assert_close(result.irrel_logits, expected)
    assert_close(result.rel_logits + result.irrel_logits, true_logits(model, tokens))


@every_family
def test_z_is_what_the_output_projection_reads(family: str):
    model, tokens = tiny(family), prompts()
    sources, baseline = random_sources(model, seed=0), random_baseline(model, tokens)
    writers = {str(layer): writer for layer, writer in enumerate(_writers(model))}
    with _inputs_and_outputs(writers) as seen:
        true_logits(model, tokens)
    result = decompose(model, tokens, sources, baseline, ReferenceRules())
    for layer, (z, _) in seen.items():
        site = ("z", int(layer))
        assert_close((result.rel[site] + result.irrel[site]).flatten(-2), z)
    for layer, head, position in sources:
        where = slice(None) if position is None else position
        reset = result.irrel["z", layer][:, where, head]
        assert torch.equal(reset, baseline[layer][:, where, head])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_q_k_v_are_what_the_projections_return(family: str):
    model, tokens = tiny(family), prompts()
    modules = {
        f"{name}{layer}": getattr(block.self_attn, f"{name}_proj")
        for layer, block in enumerate(model.model.layers)
        for name in "qkv"
    }
    with _inputs_and_outputs(modules) as seen:
        true_logits(model, tokens)
    baseline = random_baseline(model, tokens)
    result = decompose(model, tokens, [(0, 1, None)], baseline, ReferenceRules())
    for layer in range(model.config.num_hidden_layers):
        for name in "qkv":
            full = result.rel[name, layer] + result.irrel[name, layer]
            assert_close(full.flatten(-2), seen[f"{name}{layer}"][1])
        assert result.rel["k", layer].shape[2] == model.config.num_key_value_heads


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f not in ("gpt2", "gptj", "gpt_neo", "opt")]
)
@pytest.mark.parametrize("layer", [0, 1])
def test_decomposed_attention_is_the_models_attention_on_the_relevant_parts(
    family: str, layer: int
):
    model, tokens = tiny(family), prompts()
    baseline = random_baseline(model, tokens)
    sources = [(0, head, None) for head in range(2)]
    result = decompose(model, tokens, sources, baseline, ReferenceRules())
    q, k, v = (Pair(result.rel[name, layer], result.irrel[name, layer]) for name in ("q", "k", "v"))
    others = [head for head in range(head_shape(model)[0]) if (layer, head, None) not in sources]
    expected = hugging_face_attention(model, tokens, layer, q, k, v.rel)
    assert layer == 0 or expected.any()
    assert_close(result.rel["z", layer][:, :, others], expected[:, :, others])


@every_family
def test_linear_rules_are_additive_over_heads_of_one_layer(family: str):
    model, tokens = tiny(family), prompts()
    baseline = random_baseline(model, tokens)
    first, second = [(0, 0, None), (0, 3, 2)], [(0, 1, None), (0, 3, 4)]
    parts = [
        decompose(model, tokens, sources, baseline, LINEAR).rel_logits
        for sources in (first, second, first + second)
    ]
    assert_close(parts[0] + parts[1], parts[2], atol=1e-8)


@every_family
def test_linear_rules_are_additive_over_layers_when_no_source_reaches_another(family: str):
    # Upstream relevance is thrown away where it meets a source head's reset, so an earlier
    # layer's head and a later layer's add up only if the later one cannot see the earlier.
    model, tokens = tiny(family), prompts()
    baseline = random_baseline(model, tokens)
    early_layer, late_layer = [(0, 1, 5)], [(1, 2, 4)]
    parts = [
        decompose(model, tokens, sources, baseline, LINEAR).rel_logits
        for sources in (early_layer, late_layer, early_layer + late_layer)
    ]
    assert_close(parts[0] + parts[1], parts[2], atol=1e-8)


def test_a_source_outside_the_model_is_refused():
    model, tokens = tiny("llama"), prompts()
    with pytest.raises(ValueError, match="outside"):
        decompose(model, tokens, [(2, 0, None)], random_baseline(model, tokens), OFFICIAL)


# Hand-worked numbers ------------------------------------------------------------------------------


def pair(rel: list[float], irrel: list[float]) -> Pair:
    return Pair(torch.tensor(rel, dtype=torch.float64), torch.tensor(irrel, dtype=torch.float64))


def random_pair(*shape: int) -> Pair:
    generator = torch.Generator().manual_seed(0)
    return Pair(*torch.randn(2, *shape, generator=generator, dtype=torch.float64))


def assert_pair(actual: Pair, rel: list[float], irrel: list[float]) -> None:
    assert_close(actual.rel, pair(rel, irrel).rel)
    assert_close(actual.irrel, pair(rel, irrel).irrel)


def test_bias_is_shared_by_magnitude():
    x = pair([3.0, -1.0, 0.0, 0.0], [-1.0, -3.0, 5.0, 0.0])
    bias = torch.tensor([8.0, 8.0, 8.0, 8.0], dtype=torch.float64)
    zero = pair([0.0] * 4, [0.0] * 4)
    shared = add_bias(zero, bias, x, ReferenceRules())
    assert_pair(shared, [6.0, 2.0, 0.0, 0.0], [2.0, 6.0, 8.0, 8.0])
    shared = add_bias(zero, bias, x, ReferenceRules(eps=4.0))
    assert_pair(shared, [3.0, 1.0, 0.0, 0.0], [5.0, 7.0, 8.0, 8.0])
    shared = add_bias(zero, bias, x, ReferenceRules(bias="irrelevant"))
    assert_pair(shared, [0.0] * 4, [8.0] * 4)


def test_sign_rule_gives_a_disagreement_to_the_larger_part():
    x = pair([3.0, 1.0, -2.0, 1.0, 0.0, 2.0], [-1.0, -3.0, 2.0, 1.0, -4.0, -3.0])
    assert_pair(
        sign(x, OFFICIAL), [2.0, 0.0, 0.0, 1.0, 0.0, 0.0], [0.0, -2.0, 0.0, 1.0, -4.0, -1.0]
    )
    assert sign(x, ReferenceRules()) is x


def test_frozen_norm_divides_both_parts_by_the_full_scale():
    # x = [7, 1]: mean 4, centred [3, -3], scale 3. The bias follows the inputs' magnitudes.
    x = pair([6.0, 1.0], [1.0, 0.0])
    bias = torch.tensor([7.0, 7.0], dtype=torch.float64)
    layer_norm = Norm(2.0, bias, 0.0, centred=True)
    frozen = norm(x, layer_norm, ReferenceRules())
    assert_pair(frozen, [5 / 3 + 6, -5 / 3 + 7], [1 / 3 + 1, -1 / 3])


def test_norm_through_uses_the_irrelevant_scale_and_the_whole_bias():
    x = pair([6.0, 1.0], [1.0, 0.0])
    bias = torch.tensor([7.0, 7.0], dtype=torch.float64)
    layer_norm = Norm(2.0, bias, 0.0, centred=True)
    assert_pair(norm(x, layer_norm, THROUGH), [0.0, 0.0], [9.0, 5.0])


def test_rms_norm_does_not_subtract_the_mean():
    x = pair([6.0, 1.0], [1.0, 0.0])  # mean square 25
    frozen = norm(x, Norm(2.0, None, 0.0, centred=False), ReferenceRules())
    assert_pair(frozen, [12 / 5, 2 / 5], [2 / 5, 0.0])


def test_activation_through_and_frozen():
    x = pair([3.0, -3.0, 1.0], [-1.0, 1.0, -1.0])
    assert_pair(activation(x, torch.relu, THROUGH), [2.0, -1.0, 0.0], [0.0, 1.0, 0.0])
    frozen = ReferenceRules(activation="frozen")
    assert_pair(activation(x, torch.relu, frozen), [3.0, 0.0, 1.0], [-1.0, 0.0, -1.0])


def test_product_through_and_half():
    a, u = pair([1.0], [2.0]), pair([4.0], [-1.0])
    assert_pair(product(a, u, THROUGH), [11.0], [-2.0])
    # (1 * 3 + 3 * 4) / 2 and (2 * 3 + 3 * -1) / 2
    assert_pair(product(a, u, LINEAR), [7.5], [1.5])


@pytest.mark.parametrize("disagreeing", ["w_gate", "w_in"])
def test_sign_rule_on_the_gate_and_on_the_up_projection(disagreeing: str):
    # One projection reads (-1, 3), which the sign rule turns into (0, 2); the other reads (1, 1).
    x = pair([-1.0, 1.0], [3.0, 1.0])
    readers = {"w_gate": [[0.0, 1.0]], "w_in": [[0.0, 1.0]], disagreeing: [[1.0, 0.0]]}
    weights = {
        name: Linear(torch.tensor(rows, dtype=torch.float64)) for name, rows in readers.items()
    }
    mlp = MLP(**weights, w_out=Linear(torch.ones(1, 1, dtype=torch.float64)), function=torch.relu)
    assert_pair(run_mlp(x, mlp, OFFICIAL), [2.0], [2.0])
    assert_pair(run_mlp(x, mlp, ReferenceRules()), [1.0], [3.0])


def test_sign_rule_after_w_out():
    # f(4) - f(1) = -3 and f(1) = 1 disagree only after the activation: -3 + 1 = -2.
    x = pair([3.0], [1.0])
    one = Linear(torch.ones(1, 1, dtype=torch.float64))
    mlp = MLP(w_in=one, w_out=one, function=lambda x: 2 - x if x.max() > 2 else x)
    assert_pair(run_mlp(x, mlp, OFFICIAL), [-2.0], [0.0])
    assert_pair(run_mlp(x, mlp, ReferenceRules()), [-3.0], [1.0])


@pytest.mark.parametrize("family", ["pythia", "neox_seq", "llama", "gemma2"])
def test_sign_rule_at_the_end_of_a_block(family: str):
    block = read_model(tiny(family)).blocks[0]
    x, baseline = random_pair(2, 9, D_MODEL), torch.zeros(1)
    out = run_block(x, block, 0, [], baseline, OFFICIAL, {})
    assert not (out.rel * out.irrel < 0).any()
    out = run_block(x, replace(block, mlp=None), 0, [], baseline, OFFICIAL, {})
    assert (out.rel * out.irrel < 0).any()


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="attention"):
        ReferenceRules(attention="quarter")


# Attention-only, without norms --------------------------------------------------------------------


def attention_only_model(seed: int = 0) -> tuple[dict[str, Tensor], SimpleNamespace]:
    """Two layers of three heads, as a HookedTransformer's state dict and configuration."""
    d_model, d_head, n_heads, d_vocab = 12, 4, 3, 20
    shapes = {
        "embed.W_E": (d_vocab, d_model),
        "pos_embed.W_pos": (16, d_model),
        "unembed.W_U": (d_model, d_vocab),
        "unembed.b_U": (d_vocab,),
    }
    for layer in range(2):
        name = f"blocks.{layer}.attn"
        shapes |= {f"{name}.W_{letter}": (n_heads, d_model, d_head) for letter in "QKV"}
        shapes |= {f"{name}.b_{letter}": (n_heads, d_head) for letter in "QKV"}
        shapes |= {f"{name}.W_O": (n_heads, d_head, d_model), f"{name}.b_O": (d_model,)}
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return weights, SimpleNamespace(n_layers=2, d_head=d_head, normalization_type=None, eps=0.0)


def test_a_last_layer_head_is_its_direct_logit_attribution():
    weights, cfg = attention_only_model()
    tokens = prompts(2, 6) % 20
    baseline = torch.zeros(2, 2, 6, 3, cfg.d_head, dtype=torch.float64)
    rules = ReferenceRules(bias="irrelevant")
    plain = decompose_hooked(weights, cfg, tokens, [], baseline, rules)
    result = decompose_hooked(weights, cfg, tokens, [(1, 2, None)], baseline, rules)
    z = plain.irrel["z", 1][:, :, 2]
    direct = z @ weights["blocks.1.attn.W_O"][2] @ weights["unembed.W_U"]
    assert_close(result.rel_logits, direct)


def test_decomposed_attention_of_one_query_by_hand():
    weights, cfg = attention_only_model()
    tokens = prompts(1, 4) % 20
    baseline = torch.zeros(2, 1, 4, 3, cfg.d_head, dtype=torch.float64)
    rules = ReferenceRules()
    result = decompose_hooked(weights, cfg, tokens, [(0, 0, None), (0, 1, None)], baseline, rules)
    query, head = 2, 1
    q = result.rel["q", 1][0, query, head]
    keys, values = (result.rel[name, 1][0, : query + 1, head] for name in "kv")
    scores = torch.stack([q @ key / 2.0 for key in keys])  # sqrt(d_head) = 2
    weight = scores.exp() / scores.exp().sum()
    by_hand = sum(weight[key] * values[key] for key in range(query + 1))
    assert_close(result.rel["z", 1][0, query, head], by_hand)


# The official code's numbers ----------------------------------------------------------------------


class Official:
    """The official code's numbers, and the reference's on the same inputs."""

    def __init__(self) -> None:
        numpy = pytest.importorskip("numpy")
        safetensors = pytest.importorskip("safetensors.torch")
        stem = FIXTURES / "cdt-official-tiny"
        self.about = json.loads(stem.with_suffix(".json").read_text())
        self.cfg = SimpleNamespace(**self.about["config"])
        weights = safetensors.load_file(stem.with_suffix(".safetensors"))
        self.weights = {
            name: weight.double() for name, weight in weights.items() if weight.is_floating_point()
        }
        with numpy.load(stem.with_suffix(".npz")) as arrays:
            self.arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.tokens = self.arrays["tokens"]
        self.decompose = cache(self._decompose)

    def source_sets(self, kind: str) -> list[tuple[Source, ...]]:
        layers, heads = range(self.cfg.n_layers), range(self.cfg.n_heads)
        positions = range(self.tokens.shape[1])
        if kind == "heads":
            return [((layer, head, None),) for layer in layers for head in heads]
        if kind == "singles":
            return [((layer, head, p),) for layer in layers for p in positions for head in heads]
        listed = self.about["source_sets"]["multi"]
        return [tuple((layer, head, p) for layer, p, head in sources) for sources in listed]

    def baseline(self, kind: str) -> Float[Tensor, "layer batch pos head d_head"]:
        if kind == "cf":
            flat = self.arrays["cf_acts"].double()
        else:
            flat = self.arrays["mean_acts"].double()[:, None].expand(-1, len(self.tokens), -1, -1)
        acts = flat.unflatten(-1, (self.cfg.n_heads, self.cfg.d_head))
        return torch.zeros_like(acts) if kind == "zero" else acts

    def _decompose(self, sources: tuple[Source, ...], baseline: str) -> Decomposition:
        return decompose_hooked(
            self.weights, self.cfg, self.tokens, sources, self.baseline(baseline), OFFICIAL
        )


@pytest.fixture(scope="module")
def official() -> Official:
    if not (FIXTURES / "cdt-official-tiny.json").exists():
        pytest.skip(f"the official code's numbers are not at {FIXTURES}; set CDT_FIXTURES")
    return Official()


def assert_official(actual: Tensor, expected: Tensor) -> None:
    """As close as the official code is to itself: it loses up to 3.4e-5 of the biases."""
    difference = actual - expected.double()
    assert difference.abs().max() <= 5e-5
    assert difference.norm() <= 2e-5 * expected.double().norm()


def test_official_model(official: Official):
    result = official.decompose((), "mean")
    assert_close(result.irrel_logits, official.arrays["logits"].double(), atol=1e-5)  # float32


@pytest.mark.parametrize(
    ("kind", "baseline"),
    [
        ("heads", "mean"),
        ("heads", "zero"),
        ("heads", "cf"),
        ("singles", "mean"),
        ("singles", "zero"),
        ("multi", "mean"),
        ("multi", "zero"),
    ],
)
def test_official_logits(official: Official, kind: str, baseline: str):
    relevant = [
        official.decompose(sources, baseline).rel_logits[:, -1]
        for sources in official.source_sets(kind)
    ]
    assert_official(torch.stack(relevant), official.arrays[f"{kind}_{baseline}_rel_last"])


_ON_ALL_SITES = [("heads", "mean"), ("multi", "mean")]


@pytest.mark.parametrize(
    ("site", "kind", "baseline"),
    [(site, *sets) for site in ("residual", "query", "key", "value") for sets in _ON_ALL_SITES]
    + [("residual", "heads", "zero")],
)
@pytest.mark.parametrize("part", ["rel", "irrel"])
def test_official_targets(official: Official, site: str, kind: str, baseline: str, part: str):
    at = {"residual": "z", "query": "q", "key": "k", "value": "v"}[site]
    results = [
        getattr(official.decompose(sources, baseline), part)
        for sources in official.source_sets(kind)
    ]
    targets = [
        torch.stack([values[at, layer][:, p, head] for layer, p, head in official.about["targets"]])
        for values in results
    ]
    expected = official.arrays[f"target_{site}_{kind}_{baseline}_{part}"]
    assert_official(torch.stack(targets), expected)
