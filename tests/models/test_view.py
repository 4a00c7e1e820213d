"""The view over both model classes, and proof (j): the caller's model is never changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.checks import assert_close, assert_same_bits, left_untouched
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout, build, prompts
from helpers.tiny_tasks import examples, many
from helpers.wrapped import BACKENDS, needs_hooked, wrap
from torch import nn

import cdt_lens as cdt
from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.decomposition.baseline import zero_baseline
from cdt_lens.models.heads import Head
from cdt_lens.models.view import ModelView, is_model, view_of

SEEN = {
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "resid_post": "hook_resid_post",
    "pre": "mlp.hook_pre",
    "post": "mlp.hook_post",
}


@models()
def test_a_run_records_what_transformer_lens_caches(family, backend, tokenizer_folder):
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        tokens = prompts(3, 9, seed=3)
        sites = [(name, layer) for name in SEEN for layer in range(view.n_layers)]
        trace = view.run(tokens, sites)
        more = {"use_cache": False} if view.is_bridge else {}
        with torch.no_grad():
            logits, cache = view.tl.run_with_cache(tokens, **more)
    for name, layer in sites:
        assert_close(trace[name, layer], cache[f"blocks.{layer}.{SEEN[name]}"], atol=0)
    for layer in range(view.n_layers):
        assert_close(trace.resid[layer + 1], cache[f"blocks.{layer}.hook_resid_post"], atol=0)
    assert len(trace.resid) == view.n_layers + 1
    with Float64Throughout():
        assert torch.equal(view.logits(tokens), logits)


@models()
def test_a_replay_without_hooks_is_the_run_from_any_layer_for_any_copies(
    family, backend, tokenizer_folder
):
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        trace = view.run(prompts(2, 9, seed=4))
        for start in range(view.n_layers):
            out = view.replay(trace, trace.resid[start].repeat(3, 1, 1), start, {})
            assert_close(out, trace.resid[-1].repeat(3, 1, 1), atol=1e-12)
        middle = view.replay(trace, trace.resid[0], 0, {}, stop=1)
        assert_close(middle, trace.resid[1], atol=1e-12)


@models()
def test_the_end_of_the_model_is_put_together_right(family, backend, tokenizer_folder):
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        tokens = prompts(2, 9, seed=5)
        candidates = torch.tensor([[0, 5, 127], [64, 7, 7]])
        by_position = view.run(tokens).resid[-1].transpose(0, 1)  # [pos, batch, d_model]
        with view.quiet():
            logits = view.candidate_logits(by_position, candidates)
            whole = view.read_out(by_position[-1])
        own = view.logits(tokens)
    expected = own.gather(-1, candidates[:, None].expand(-1, tokens.shape[1], -1))
    assert_close(logits.transpose(0, 1), expected, atol=1e-12)
    assert_close(whole, own[:, -1], atol=1e-12)
    assert (view.logit_softcap is not None) == (family == "gemma2")


@models(("gpt2", "llama", "gemma3"))
def test_padding_on_the_right_reaches_no_real_position(family, backend, tokenizer_folder):
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        tokens = prompts(1, 5, seed=6)
        sites = [("z", view.n_layers - 1), ("mlp_out", view.n_layers - 1)]
        alone = view.run(tokens, sites)
        for padding in (0, 77):
            padded = torch.nn.functional.pad(tokens, (0, 4), value=padding)
            trace = view.run(torch.cat([padded, prompts(1, 9, seed=7)]), sites)
            for site in sites:
                assert_close(trace[site][:1, :5], alone[site], atol=1e-12)


@models()
def test_the_shape_is_the_models(family, backend, tokenizer_folder):
    view = shared(family, backend, tokenizer_folder)
    config = build(family).config
    assert view.n_layers == config.num_hidden_layers
    assert view.n_heads == config.num_attention_heads
    assert view.n_kv_heads == getattr(config, "num_key_value_heads", view.n_heads)
    assert view.d_model == config.hidden_size
    assert view.n_ctx == config.max_position_embeddings
    z = view.run(prompts(1, 4), [("z", 0), ("k", 0)])
    assert z["z", 0].shape == (1, 4, view.n_heads, view.d_head)
    assert z["k", 0].shape == (1, 4, view.n_kv_heads, view.d_head)
    expected = {"ln1"} if family == "cohere" else {"ln1", "ln2"}
    expected |= {"q_norm", "k_norm"} if family in ("qwen3", "gemma3") else set()
    expected |= {"ln1_post", "ln2_post"} if family in ("gemma2", "gemma3") else set()
    assert set(view.norms(0)) == expected
    assert view.norms(view.n_layers) == ("ln_final",)


@models(("gpt2", "pythia", "llama"))
def test_a_norms_bias_is_the_weight(family, backend, tokenizer_folder):
    view = shared(family, backend, tokenizer_folder)
    weights = dict(build(family).named_parameters())
    names = {
        "gpt2": "transformer.h.1.ln_2.bias",
        "pythia": "gpt_neox.layers.1.post_attention_layernorm.bias",
    }
    bias = view.norm_bias("ln2", 1)
    if family == "llama":
        assert bias is None
    else:
        assert torch.equal(bias, weights[names[family]])
        assert not bias.requires_grad


def test_hooks_see_and_replace_and_are_gone_afterwards(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    tokens = prompts(1, 4)
    plain = view.logits(tokens)
    seen = []
    with left_untouched(view.tl), view.hooked({("z", 0): seen.append, ("z", 1): torch.zeros_like}):
        assert not torch.equal(view.logits(tokens), plain)
    assert len(seen) == 1
    assert torch.equal(view.logits(tokens), plain)


def test_a_site_that_the_model_lacks_is_refused_and_nothing_stays_behind(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    hooks = {("z", 0): lambda z: None, ("pre_linear", 1): lambda z: None}
    with (
        left_untouched(view.tl),
        pytest.raises(UnsupportedModelError, match="layer 1 has no activation 'pre_linear'"),
        view.hooked(hooks),
    ):
        pass


def test_a_prompt_longer_than_the_context_is_refused(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    with left_untouched(view.tl), pytest.raises(InputError, match="65 tokens.*at most 64"):
        view.run(prompts(1, 65))


@models(("gpt2", "llama"))
def test_no_pass_reads_past_the_context(family, backend, tokenizer_folder):
    """Learned positions would end in an IndexError, rotary ones run on without a word."""
    view = shared(family, backend, tokenizer_folder)
    for read in (view.run, view.stream, view.logits):
        with left_untouched(view.tl), pytest.raises(InputError, match="^prompt of 65 tokens: .*64"):
            read(prompts(1, 65))
    with pytest.raises(InputError, match="^valid, example 3: prompt of 65 tokens: "):
        view.check_length(65, "valid, example 3: ")
    view.check_length(64)


def test_another_class_is_refused_with_the_way_out(tokenizer_folder):
    for model in (nn.Linear(2, 2), build("gpt2")):
        assert not is_model(model)
        with pytest.raises(InputError, match=f"{type(model).__name__}.*load_model"):
            view_of(model)
    view = shared("gpt2", "bridge", tokenizer_folder)
    assert view_of(view) is view
    assert view_of(view.tl).tl is view.tl


@needs_hooked
@pytest.mark.parametrize("norm", [None, "LN", "RMS"])
def test_an_attention_only_model_has_no_mlp_sites(norm):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=1, d_model=8, d_head=4, n_heads=2, d_vocab=10, n_ctx=8, attn_only=True,
        normalization_type=norm, seed=0, device="cpu",
    )  # fmt: skip
    view = ModelView(HookedTransformer(config))
    assert not {name for name, _ in view.sites} & {"pre", "post", "mlp_out", "ln2.in"}
    assert view.norms(1) == (() if norm is None else ("ln_final",))
    tokens = torch.arange(6)[None]
    resid = view.normed(view.run(tokens).resid[-1])
    columns, biases = view.unembedding(torch.arange(10)[None])
    assert_close(resid[0] @ columns[0].T + biases, view.logits(tokens)[0], atol=1e-6)


# Proof (j): nothing of the caller's model changes --------------------------------------------------

HEADS = (Head(0, 1), Head(1, 2))


def public_calls(model: Any) -> dict[str, Callable[[], Any]]:
    """Every public function that takes a model, on arguments made beforehand."""
    data, pairs = examples(), examples(seed=5, name="tiny/pairs")
    quiet = {"progress": False}
    baseline = cdt.mean_activations(model, data, **quiet)
    paired = cdt.counterfactual_baseline(model, data, pairs)
    scores = cdt.score_heads(model, data, baseline, **quiet)
    circuit = scores.select(k=3)
    return {
        "load_model": lambda: cdt.load_model(model),
        "mean_activations": lambda: cdt.mean_activations(model, data, **quiet),
        "zero_baseline": lambda: zero_baseline(model, data),
        "counterfactual": lambda: cdt.score_heads(model, data, paired, heads=HEADS, **quiet),
        "decompose": lambda: cdt.decompose(
            model, data, [HEADS], baseline, rules="official", targets=[Head(1, 0)]
        ),
        "linear": lambda: cdt.score_heads(
            model, data, baseline, rules="linear", heads=HEADS, **quiet
        ),
        "exact_ablation": lambda: cdt.exact_ablation(model, data, baseline, heads=HEADS, **quiet),
        "circuit_metric": lambda: circuit_metric(model, [HEADS], data, baseline, **quiet),
        "circuit_faithfulness": lambda: cdt.circuit_faithfulness(
            model, circuit, data, baseline, draws=1, **quiet
        ),
        "faithfulness_curve": lambda: cdt.faithfulness_curve(
            model, scores, data, baseline, fractions=(0.0, 0.5, 1.0), draws=1, **quiet
        ),
        "greedy_circuit": lambda: cdt.greedy_circuit(
            model, scores, data, baseline, k=1, pool=2, **quiet
        ),
        "evaluate": lambda: cdt.evaluate(model, data),
    }


class Stop(Exception):
    pass


def unusual(model: nn.Module) -> list[str]:
    """Mixed modes and gradient flags, and hooks of the user's own; returns what they note."""
    model(prompts(1, 3))  # at its first run a bridge attaches hooks of its own, for good
    model.train()
    for number, module in enumerate(model.modules()):
        if number % 3 == 0:
            module.training = False
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    fired: list[str] = []
    model.blocks[1].register_forward_hook(lambda *_: fired.append("block"))
    model.add_hook("blocks.1.attn.hook_z", lambda z, hook: fired.append("hook_z"))
    return fired


@models(("gpt2", "llama"))
@pytest.mark.parametrize("grad", [True, False])
def test_every_public_call_leaves_the_model_as_it_was(family, backend, grad, tokenizer_folder):
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    fired = unusual(model)
    calls = public_calls(model)
    with torch.set_grad_enabled(grad):
        for name, call in calls.items():
            fired.clear()
            with left_untouched(model):
                call()
            if name not in ("load_model", "zero_baseline"):
                assert set(fired) == {"block", "hook_z"}, name


@models(("gpt2", "llama"))
def test_a_call_that_raises_in_the_middle_leaves_the_model_as_it_was(
    family, backend, tokenizer_folder
):
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    unusual(model)
    calls = public_calls(model)
    countdown = [0]

    def bomb(*_: Any) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Stop

    for firing in (1, 3):  # in the first ordinary run, and later, mostly in a replay
        handle = model.blocks[1].attn.register_forward_hook(bomb)
        for name, call in calls.items():
            countdown[0] = firing
            with left_untouched(model):
                try:
                    call()
                except Stop:
                    continue
            assert firing > 1 or name in ("load_model", "zero_baseline"), f"{name} ran no model"
        handle.remove()


@models(("gpt2", "llama"))
def test_the_check_itself_leaves_the_model_as_it_was(family, backend, tokenizer_folder):
    for firing in (1, 2, 5, 10_000):
        model = wrap(family, backend, tokenizer_folder, torch.float32)
        unusual(model)
        countdown = [firing]

        def bomb(*_: Any, countdown: list[int] = countdown) -> None:
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Stop

        model.blocks[0].attn.register_forward_hook(bomb)
        with left_untouched(model):
            try:
                cdt.load_model(model)
            except Stop:
                assert firing < 10_000


@models(("gpt2", "llama"))
def test_dropout_is_off_whatever_the_mode(family, backend, tokenizer_folder):
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    tokens = prompts(2, 9)
    expected = ModelView(model).logits(tokens)
    model.train()
    for _ in range(2):
        assert torch.equal(ModelView(model).logits(tokens), expected)


@models(("gpt2", "llama"))
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_is_the_users(family, backend, side, tokenizer_folder):
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    before = model.tokenizer.padding_side
    try:
        model(prompts(1, 3))  # at its first run a bridge attaches hooks of its own, for good
        model.tokenizer.padding_side = side
        handle = model.blocks[1].register_forward_hook(lambda *_: None)
        for call in (
            lambda: cdt.mean_activations(model, examples(), progress=False),
            lambda: ModelView(model).logits(prompts(2, 5)),
        ):
            with left_untouched(model):
                call()
        handle.remove()
        model.blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(Stop()))
        with left_untouched(model), pytest.raises(Stop):
            ModelView(model).run(prompts(2, 5))
        assert model.tokenizer.padding_side == side
    finally:
        model.tokenizer.padding_side = before  # the tokenizer is shared between tests


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_of_the_caller_changes_no_number(dtype, tokenizer_folder):
    seen = shared("llama", "bridge", tokenizer_folder, torch.float32)
    data = many(20)
    baseline = cdt.mean_activations(seen, data, progress=False)
    whole, some = (
        cdt.score_heads(seen, data, baseline, exact=exact, progress=False) for exact in ("all", 9)
    )
    torch.set_default_dtype(dtype)
    try:
        for exact, plain in (("all", whole), (9, some)):
            found = cdt.score_heads(seen, data, baseline, exact=exact, progress=False)
            for name in ("values", "stderr", "per_example"):
                assert_same_bits(getattr(found, name), getattr(plain, name))
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_of_the_caller_changes_no_number(backend, tokenizer_folder):
    """Scores are computed in the type of the model."""
    seen = shared("llama", backend, tokenizer_folder, torch.float32)
    data = many(6)
    baseline = cdt.mean_activations(seen, data, progress=False)
    plain = cdt.score_heads(seen, data, baseline, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = cdt.mean_activations(seen, data, progress=False)
        found = cdt.score_heads(seen, data, own, progress=False)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found.values, plain.values)
