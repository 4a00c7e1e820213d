"""What has no rule is refused by name; what is accepted obeys the rules, whatever the family."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import accelerate
import pytest
import torch
import transformers
from helpers.checks import assert_close, relative, unchecked_types
from helpers.shared import models, shared
from helpers.tiny_models import D_VOCAB, Float64Throughout, _randomise as randomise, prompts
from helpers.wrapped import needs_hooked, tokenizer, wrap
from torch import Tensor, nn

from cdt_lens.core.errors import CdtLensError, InputError, UnsupportedModelError
from cdt_lens.decomposition.gated_pass import GatedPass
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import PRESETS, Rules
from cdt_lens.decomposition.slopes import SLOPES
from cdt_lens.models.loading import _bridge
from cdt_lens.models.support import check_supported
from cdt_lens.models.view import ModelView

_PLAIN = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
_LLAMA = {**_PLAIN, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
_UNGROUPED = {**_LLAMA, "num_key_value_heads": 4}
_BLOOM = {"vocab_size": D_VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "granite_moe": (
        lambda: transformers.GraniteMoeForCausalLM(
            transformers.GraniteMoeConfig(**_LLAMA, **_EXPERTS)
        ),
        "mixture-of-experts MLP of granitemoe",
    ),
    "mamba": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(
                vocab_size=D_VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8
            )
        ),
        "layer 0 without attention heads",
    ),
    "gpt_oss": (
        lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(
                **_LLAMA, **_EXPERTS, head_dim=8,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )
        ),
        "attention sinks",
    ),
    "bloom": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(**_BLOOM, attn_implementation="eager")
        ),
        "alibi positions",
    ),
    "gpt_neo": (
        lambda: transformers.GPTNeoForCausalLM(
            transformers.GPTNeoConfig(
                vocab_size=D_VOCAB, hidden_size=32, num_layers=2, num_heads=4,
                max_position_embeddings=64, attention_types=[[["global", "local"], 1]],
                window_size=8, attn_implementation="eager",
            )
        ),
        "attention whose pattern",
    ),
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**_PLAIN, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0)
        ),
        "attention whose pattern",
    ),
    "youtu": (
        lambda: transformers.YoutuForCausalLM(transformers.YoutuConfig(**_UNGROUPED)),
        "attention .z is not pattern @ v",
    ),
    "olmo": (
        lambda: transformers.OlmoForCausalLM(transformers.OlmoConfig(**_LLAMA)),
        "norm ln1",
    ),
}  # fmt: skip

ACCEPTED: dict[str, Callable[[], Any]] = {
    "phi": lambda: transformers.PhiForCausalLM(
        transformers.PhiConfig(**_UNGROUPED, partial_rotary_factor=0.5)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_LLAMA)),
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**_LLAMA, head_dim=8)
    ),
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**_UNGROUPED)),
    # The bridge of transformer-lens 3 scales by `weight` in place of 1 + weight once a hook edits.
    "nemotron": lambda: transformers.NemotronForCausalLM(transformers.NemotronConfig(**_LLAMA)),
    "stablelm": lambda: transformers.StableLmForCausalLM(
        transformers.StableLmConfig(**_UNGROUPED, use_parallel_residual=False)
    ),
    "falcon": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=D_VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            attn_implementation="eager",
        )
    ),
}  # fmt: skip


def bridge(build_model: Callable[[], Any], folder: str) -> ModelView:
    """The model with random weights, float64 all the way; call it under Float64Throughout."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformer-lens says while it wraps
        torch.manual_seed(0)
        model = build_model().double().eval().requires_grad_(False)
        randomise(model, torch.Generator().manual_seed(1))
        view = ModelView(_bridge(model, tokenizer(folder), "cpu", torch.float64))
    view.tl.eval()
    return view


@pytest.mark.parametrize("family", REFUSED)
def test_a_component_without_a_rule_is_refused_by_name(family, tokenizer_folder):
    build_model, component = REFUSED[family]
    with Float64Throughout(), pytest.raises(UnsupportedModelError, match=component) as caught:
        check_supported(bridge(build_model, tokenizer_folder))
    assert "\n" not in str(caught.value)


def test_a_model_that_accelerate_offloads_whole_is_refused_with_the_way_out(tokenizer_folder):
    model = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    accelerate.cpu_offload(model.original_model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"weight .* is offloaded.*offload\(model\)"):
        check_supported(ModelView(model))


@models(("mixtral",))
def test_experts_of_grouped_products_are_refused_in_float64(family, backend, tokenizer_folder):
    """torch has no such product in float64: a RuntimeError in the middle of a run."""
    model = wrap(family, backend, tokenizer_folder)
    model.original_model.set_experts_implementation("grouped_mm")
    with pytest.raises(UnsupportedModelError, match="experts_implementation='eager'"):
        check_supported(ModelView(model))


def test_quantised_weights_of_a_model_of_ones_own_are_refused(tokenizer_folder):
    model = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    packed = torch.zeros(4, dtype=torch.uint8)
    model.blocks[0].mlp.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
    with pytest.raises(UnsupportedModelError, match=r"quantised weights \(.*packed in uint8\)"):
        check_supported(ModelView(model))


@pytest.mark.parametrize("native", [{"attn_only": True}, {"d_mlp": 16, "act_fn": "gelu"}])
def test_a_native_bridge_is_refused_with_a_reason_or_works(native):
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    config = TransformerBridgeConfig(
        n_layers=1, d_model=8, d_head=4, n_heads=2, d_vocab=10, n_ctx=8, device="cpu",
        normalization_type="LN", seed=0, **native,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="cannot edit"):
        check_supported(ModelView(TransformerBridge.boot_native(config)))


# What is accepted ----------------------------------------------------------------------------------


class Experiment:
    """One head of one layer as the source, on two prompts, with a baseline of ones own."""

    def __init__(self, view: ModelView) -> None:
        self.view, self.tokens = view, prompts(2, 8, seed=1)
        self.candidates = torch.arange(20).expand(2, -1)
        sites = [("z", layer) for layer in range(view.n_layers)]
        self.z = [view.run(self.tokens, sites)[site] for site in sites]
        generator = torch.Generator().manual_seed(2)
        self.baseline = [
            torch.randn(z.shape, generator=generator, dtype=torch.float64) for z in self.z
        ]

    def relevant(self, rules: Rules, layer: int, heads: list[int], times: float = 1.0) -> Tensor:
        """Relevant logits; `times` moves the baseline so that z - baseline is that much larger."""
        baseline = [z + times * (b - z) for z, b in zip(self.z, self.baseline, strict=True)]
        lengths = torch.tensor([8, 8])
        engine = Propagator(self.view, self.tokens, lengths, lambda at: baseline[at], rules)
        mask = torch.zeros(1, 1, 1, self.view.n_heads, dtype=torch.bool)
        mask[..., heads] = True
        irrel = engine.candidate_logits(engine.propagate({layer: mask}), self.candidates)[0]
        return engine.full_logits(self.candidates) - irrel

    def ablated(self, layer: int, heads: list[int]) -> Tensor:
        """What TransformerLens' own hooks say that ablating the heads takes away."""

        def reset(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, heads] = self.baseline[layer][:, :, heads]
            return z

        more = {"use_cache": False} if self.view.is_bridge else {}
        hooks = [(f"blocks.{layer}.attn.hook_z", reset)]
        with torch.no_grad():
            out = self.view.tl.run_with_hooks(self.tokens, fwd_hooks=hooks, **more)
        return (self.view.logits(self.tokens) - out)[:, -1, :20]


def assert_obeys_the_rules(view: ModelView) -> None:
    """Everything through is ablation; everything frozen is linear in z - baseline."""
    experiment = Experiment(view)
    linear = PRESETS["linear"]
    for layer in range(view.n_layers):
        through = experiment.relevant(PRESETS["ablation"], layer, [1])
        assert_close(through, experiment.ablated(layer, [1]), atol=1e-11)
        once = experiment.relevant(linear, layer, [1])
        assert relative(experiment.relevant(linear, layer, [1], times=3.0), 3 * once) < 1e-11
        other = experiment.relevant(linear, layer, [0, 3])
        assert relative(experiment.relevant(linear, layer, [0, 1, 3]), once + other) < 1e-11


@pytest.mark.parametrize("family", ACCEPTED)
def test_what_is_accepted_obeys_the_rules(family, tokenizer_folder):
    with Float64Throughout():
        try:
            view = bridge(ACCEPTED[family], tokenizer_folder)
            check_supported(view)
        except UnsupportedModelError as refused:
            pytest.skip(f"refused, which is right too: {refused}")
        assert_obeys_the_rules(view)


@models()
def test_the_tested_families_are_accepted_and_obey_the_rules(family, backend, tokenizer_folder):
    with Float64Throughout():
        assert_obeys_the_rules(shared(family, backend, tokenizer_folder))


def normed_queries(folder: str) -> ModelView:
    """StableLM 2 12B's attention: the bridge has no hook point for the scale of these norms."""
    config = transformers.StableLmConfig(**_UNGROUPED, qk_layernorm=True)
    return bridge(lambda: transformers.StableLmForCausalLM(config), folder)


def solu(_: str) -> ModelView:
    """The MLP of TransformerLens' solu models, with a norm behind its activation."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=32, d_head=8, n_heads=4, d_mlp=48, d_vocab=D_VOCAB, n_ctx=32, seed=0,
        device="cpu", act_fn="solu_ln", normalization_type="LN", dtype=torch.float64,
    )  # fmt: skip
    return ModelView(HookedTransformer(config).eval())


_NEEDS_A_NORM = {
    "frozen": Rules(norm="frozen", attention="frozen"),
    "frozen, moving": Rules(norm="frozen", attention="through"),
    "decomposed": Rules(attention="decomposed"),
    "official": PRESETS["official"],
    "biases": Rules(bias="proportional", attention="frozen"),
}


@pytest.mark.parametrize(
    ("build_model", "part", "refused", "slopes"),
    [
        (normed_queries, "attention", ("frozen, moving", "decomposed", "official"), ("gim",)),
        pytest.param(
            solu,
            "mlp",
            ("frozen", "frozen, moving", "official", "biases"),
            ("linear", "gim"),
            marks=needs_hooked,
        ),
    ],
)
def test_a_norm_without_a_hook_point_is_refused_by_the_rules_that_treat_it(
    build_model, part, refused, slopes, tokenizer_folder
):
    told = rf"the {part} holds a norm without a hook point"
    with Float64Throughout():
        view = build_model(tokenizer_folder)
        assert check_supported(view).hidden_norms == {part}
        experiment = Experiment(view)
        for name, rules in _NEEDS_A_NORM.items():
            with (
                pytest.raises(UnsupportedModelError, match=told)
                if name in refused
                else nullcontext()
            ):
                experiment.relevant(rules, 0, [1])
        for name in ("linear", "stable", "shared", "gradient", "direct", "gim"):
            with pytest.raises(UnsupportedModelError) if name in slopes else nullcontext():
                GatedPass(view, SLOPES[name])
        through = experiment.relevant(PRESETS["ablation"], 0, [1])
        assert_close(through, experiment.ablated(0, [1]), atol=1e-11)


@models()
def test_the_norms_of_the_tested_families_have_hook_points(family, backend, tokenizer_folder):
    view = shared(family, backend, tokenizer_folder, torch.float32)
    assert check_supported(view).hidden_norms == frozenset()


# Weights and switches ------------------------------------------------------------------------------


@models(("gpt2", "llama"))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(family, backend, value, tokenizer_folder):
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    name, parameter = list(model.named_parameters())[7]
    parameter.detach().view(-1)[3] = value
    with pytest.raises(InputError) as caught:
        check_supported(ModelView(model))
    assert name in str(caught.value)


@models(("gpt2", "qwen2"))
def test_biases_are_read_again_when_the_weights_have_changed(family, backend, tokenizer_folder):
    """A model that was checked, then trained, must be scored with its new biases."""
    with Float64Throughout():
        model = wrap(family, backend, tokenizer_folder)
        check_supported(ModelView(model))
        fresh = wrap(family, backend, tokenizer_folder)
        generator = torch.Generator().manual_seed(5)
        for (name, parameter), other in zip(
            model.named_parameters(), fresh.parameters(), strict=True
        ):
            if "b_" in name or name.endswith(".bias"):
                change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                with torch.no_grad():
                    parameter.add_(change)
                    other.add_(change)
        expected = Experiment(ModelView(fresh)).relevant(PRESETS["official"], 0, [1])
        actual = Experiment(ModelView(model)).relevant(PRESETS["official"], 0, [1])
    assert_close(actual, expected, atol=1e-10)


SWITCHES = (
    "set_use_attn_result",
    "set_use_split_qkv_input",
    "set_use_hook_mlp_in",
    "set_use_attn_in",
    "set_ungroup_grouped_query_attention",
)


@models(("gpt2", "llama"))
@pytest.mark.parametrize("switch", SWITCHES)
def test_transformer_lens_switches_change_no_number(family, backend, switch, tokenizer_folder):
    """Turned before the model is first checked, and turned after."""
    with Float64Throughout():
        expected = Experiment(shared(family, backend, tokenizer_folder))
        for check_first in (True, False):
            model = wrap(family, backend, tokenizer_folder)
            if not hasattr(model, switch):
                pytest.skip(f"{backend} has no {switch}")
            if check_first:
                check_supported(ModelView(model))
            try:
                getattr(model, switch)(True)
            except AssertionError:
                pytest.skip(f"transformer-lens does not allow {switch} for {family}")
            for name in ("official", "stable"):
                try:
                    actual = Experiment(ModelView(model)).relevant(PRESETS[name], 0, [1])
                except CdtLensError:
                    continue  # refused is right too; a wrong number is not
                assert_close(actual, expected.relevant(PRESETS[name], 0, [1]), atol=1e-10)


def processed(model: Any, is_bridge: bool) -> Any:
    """As `HookedTransformer.from_pretrained` leaves it by default, value biases apart."""
    options = {
        "fold_ln": True, "center_writing_weights": True, "center_unembed": True,
        "fold_value_biases": False,  # they would move z, and the baseline is of z
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_bridge:
            model.enable_compatibility_mode(**options)
        else:
            model.load_and_process_state_dict(model.state_dict(), **options)
    return model


@models(("gpt2", "pythia", "llama", "qwen3"))
def test_folding_and_centring_change_no_difference_of_logits(family, backend, tokenizer_folder):
    with Float64Throughout():
        plain = Experiment(shared(family, backend, tokenizer_folder))
        model = processed(wrap(family, backend, tokenizer_folder), backend == "bridge")
        folded = Experiment(ModelView(model))
        for name in ("stable", "linear", "ablation"):
            for layer in range(2):
                a, b = (e.relevant(PRESETS[name], layer, [1]) for e in (folded, plain))
                centred = [x - x.mean(-1, keepdim=True) for x in (a, b)]
                assert_close(*centred, atol=1e-10)


def test_rules_that_a_model_cannot_follow_are_refused(tokenizer_folder, monkeypatch):
    monkeypatch.setattr(ModelView, "activation", lambda self, layer: None)
    view = ModelView(wrap("llama", "bridge", tokenizer_folder))
    with pytest.raises(UnsupportedModelError, match="activation='through'"):
        Experiment(view).relevant(PRESETS["linear"], 0, [1])
    Experiment(view).relevant(PRESETS["stable"], 0, [1])


def test_the_check_runs_once_for_a_model(tokenizer_folder, monkeypatch):
    model = wrap("gpt2", "bridge", tokenizer_folder, torch.float32)
    first = check_supported(ModelView(model))
    monkeypatch.setattr(ModelView, "run", None)
    assert check_supported(ModelView(model)) is first


@needs_hooked
def test_a_bidirectional_model_is_refused():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=1, d_model=8, d_head=4, n_heads=2, d_vocab=10, n_ctx=8, attn_only=True,
        attention_dir="bidirectional", seed=0, device="cpu",
    )  # fmt: skip
    with unchecked_types(), pytest.raises(UnsupportedModelError, match="bidirectional"):
        check_supported(ModelView(HookedTransformer(config)))
