"""The weight hash is the same for the same model, and another one for any other."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
import torch
import transformers
from helpers.checks import relative
from helpers.shared import BOTH_CLASSES, models, other_weights, shared
from helpers.tiny_models import (
    _GROUPED,
    Float64Throughout,
    _randomise as randomise,
    build,
    prompts,
)
from helpers.tiny_tasks import examples
from helpers.tiny_training import QUICK, task
from helpers.wrapped import needs_hooked, tokenizer, wrap

from cdt_lens.core.errors import ArtifactError
from cdt_lens.finetuning.finetune import count_parameters, finetune
from cdt_lens.models.loading import _bridge
from cdt_lens.models.provenance import (
    Provenance,
    command_line,
    hashed_once,
    provenance_of,
    versions,
    weight_hash,
)
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import other_parameters, own_weights


@needs_hooked
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", BOTH_CLASSES)
def test_both_classes_have_one_hash(family, dtype, tokenizer_folder):
    hooked, bridge = (
        weight_hash(ModelView(wrap(family, backend, tokenizer_folder, dtype)))
        for backend in ("hooked", "bridge")
    )
    assert hooked == bridge
    assert len(hooked) == 64


@models()
def test_the_hash_changes_exactly_when_the_logits_do(family, backend, tokenizer_folder):
    """Every parameter in turn. Some of a bridge's are not used: they must not count."""
    with Float64Throughout():
        model = wrap(family, backend, tokenizer_folder)
        view, tokens = ModelView(model), prompts(2, 7)
        before, logits = weight_hash(view), view.logits(tokens)
        generator = torch.Generator().manual_seed(0)
        counted = 0
        for name, parameter in model.named_parameters():
            kept = parameter.detach().clone()
            change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                parameter.add_(change)
            matters = not torch.equal(view.logits(tokens), logits)
            assert (weight_hash(view) != before) == matters, name
            with torch.no_grad():
                parameter.copy_(kept)
            counted += matters
        assert weight_hash(view) == before
        assert counted >= 15


# What TransformerLens has no name for ------------------------------------------------------------


def bridge_of_config(config: Any, folder: str) -> ModelView:
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model.requires_grad_(False), torch.Generator().manual_seed(1))
    return ModelView(_bridge(model.eval(), tokenizer(folder), "cpu", torch.float32))


UNNAMED = {
    "norms of each head": (transformers.StableLmConfig, {"qk_layernorm": True}, 2 * (4 + 2)),
    "parameters of the activation": (transformers.ApertusConfig, {}, 2 * 2),
}


@pytest.mark.parametrize("name", UNNAMED)
def test_parameters_without_a_name_are_hashed_counted_and_trained(name, tokenizer_folder):
    kind, options, number = UNNAMED[name]
    view = bridge_of_config(kind(**{**_GROUPED, **options}), tokenizer_folder)
    others = other_parameters(view)
    assert len(others) == number and all(n.startswith("blocks.") for n in others)
    before = weight_hash(view)
    start = {n: p.detach().clone() for n, p in others.items()}
    for name, parameter in others.items():
        with torch.no_grad():
            parameter += 1
            assert weight_hash(view) != before
            parameter.copy_(start[name])
    with torch.random.fork_rng():
        plain = transformers.AutoModelForCausalLM.from_config(view.hf_config)
    assert count_parameters(view) == plain.num_parameters()
    result = finetune(view, task(), scope="full", **QUICK)
    assert all(torch.equal(p, start[n]) for n, p in others.items())
    assert result.trained_parameters == count_parameters(view)
    with result.adapter.applied(view):
        assert all(not torch.equal(p, start[n]) for n, p in others.items())
    assert weight_hash(view) == before


@models(("llama",))
def test_peft_layers_in_the_model_are_part_of_it(family, backend, tokenizer_folder):
    peft = pytest.importorskip("peft")
    view = ModelView(wrap(family, backend, tokenizer_folder, torch.float32))
    plain = weight_hash(view)
    if backend == "hooked":
        return  # its projections are parameters, which peft cannot wrap
    root = view.tl.original_model
    names = [n for n, m in root.named_modules() if isinstance(m, torch.nn.Linear)]
    config = peft.LoraConfig(r=2, target_modules=names[:3], init_lora_weights=False)
    peft.inject_adapter_in_model(config, root)
    hashes = {plain, weight_hash(view)}
    layer = next(m for m in root.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling"))
    with torch.no_grad():
        next(layer.lora_A["default"].parameters())[0, 0] += 1
    hashes.add(weight_hash(view))
    layer.scaling["default"] *= 2
    hashes.add(weight_hash(view))
    assert len(hashes) == 4
    assert not any("lora" in name for name in own_weights(view))
    for module in root.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(False)
    assert weight_hash(view) == plain


# The configuration -------------------------------------------------------------------------------


CHANGES: dict[str, tuple[str, str, Any]] = {
    "eps": ("llama", "rms_norm_eps", 1e-3),
    "rotary base": ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 5e3}),
    "window": ("mistral", "sliding_window", 3),
    "cap of the logits": ("gemma2", "final_logit_softcapping", 2.5),
    "cap of attention": ("gemma2", "attn_logit_softcapping", 2.5),
    "scale of attention": ("gemma3", "query_pre_attn_scalar", 30),
    "kinds of layers": ("gemma3", "layer_types", ["full_attention"] * 3),
    "scale by layer": ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    "activation": ("gpt2", "activation_function", "relu"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_configuration_is_another_model(name, tokenizer_folder):
    """The weights are the same. Each of these changes the logits."""
    family, key, value = CHANGES[name]
    kept = [bridge_of_config(build(family).config, tokenizer_folder)]
    kept.append(bridge_of_config(changed(build(family).config, key, value), tokenizer_folder))
    one, other = kept
    assert weight_hash(one) == weight_hash(other)
    tokens = prompts(2, 20)
    assert relative(other.logits(tokens), one.logits(tokens)) > 1e-6
    provenance = provenance_of(one, examples(), options={})
    provenance.check_model(one, "these scores")
    with pytest.raises(ArtifactError, match=key) as caught:
        provenance.check_model(other, "these scores")
    assert "\n" not in str(caught.value)
    assert provenance.key != provenance_of(other, examples(), options={}).key
    replace(provenance, configuration={}).check_model(other, "scores of 0.3.0")


def changed(config: Any, key: str, value: Any) -> Any:
    setattr(config, key, value)
    return config


def test_a_buffer_that_was_changed_makes_another_model(tokenizer_folder):
    view = ModelView(wrap("gemma3", "bridge", tokenizer_folder, torch.float32))
    provenance = provenance_of(view, examples(), options={})
    for name, buffer in view.tl.original_model.named_buffers():
        if "original" not in name.rsplit(".", 1)[-1]:
            before = buffer.clone()
            buffer += 1
            with pytest.raises(ArtifactError, match="buffers|weights"):
                provenance.check_model(view, "this")
            buffer.copy_(before)
    provenance.check_model(view, "this")


@needs_hooked
@pytest.mark.parametrize("family", BOTH_CLASSES)
def test_both_classes_have_one_configuration(family, tokenizer_folder):
    hooked, bridge = (
        ModelView(wrap(family, backend, tokenizer_folder, torch.float32))
        for backend in ("hooked", "bridge")
    )
    for one, other in ((hooked, bridge), (bridge, hooked)):
        provenance_of(one, examples(), options={}).check_model(other, "this")
    provenance = provenance_of(hooked, examples(), options={})
    hooked.tl.cfg.output_logits_soft_cap = 5.0
    with pytest.raises(ArtifactError, match="output_logits_soft_cap -1.0, and here 5.0"):
        provenance.check_model(hooked, "this")


@models(("llama",))
def test_a_context_and_switches_of_hooks_are_no_other_model(family, backend, tokenizer_folder):
    view = ModelView(wrap(family, backend, tokenizer_folder, torch.float32))
    provenance = provenance_of(view, examples(), options={})
    view.tl.cfg.n_ctx, view.tl.cfg.use_attn_result = 12, True
    view.logits(prompts(2, 5))
    provenance.check_model(ModelView(view.tl), "this")


@models(("gpt2", "llama"))
def test_the_hash_sees_a_change_past_autograd(family, backend, tokenizer_folder):
    """As when an adapter is merged: `weight.data += delta` leaves no version mark."""
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    before = weight_hash(ModelView(model))
    attention = model.blocks[0].attn
    weight = attention.W_Q if backend == "hooked" else attention.q.weight
    weight.data[0] += 1.0
    assert weight_hash(ModelView(model)) != before


@pytest.mark.parametrize("n_words", [128, 2048])
def test_the_hash_sees_each_element_whatever_the_size(n_words, tokenizer_folder):
    """Also an exchange, which leaves every sum as it was, of rows of a large matrix."""
    config = build("gpt2").config
    config.vocab_size = n_words
    with torch.random.fork_rng():
        network = type(build("gpt2"))(config)
    model = ModelView(_bridge(network, tokenizer(tokenizer_folder), "cpu", torch.float32))
    table = model.tl.embed.weight
    assert (table.numel() > 2**16) == (n_words == 2048)
    hashes = {weight_hash(model)}
    table.data[3, 4] += 1.0
    hashes.add(weight_hash(model))
    table.data[[5, 6]] = table.data[[6, 5]]
    hashes.add(weight_hash(model))
    assert len(hashes) == 3


def test_a_model_in_the_memory_of_another_has_its_own_hash(tokenizer_folder):
    """Models come and go; the allocator gives the next one the same addresses."""
    hashes = set()
    for number in range(4):
        model = wrap("gpt2", "bridge", tokenizer_folder, torch.float32)
        model.embed.weight.data[5, 5] += number
        hashes.add(weight_hash(ModelView(model)))
        del model
    assert len(hashes) == 4


def test_another_type_is_another_model(tokenizer_folder):
    hashes = {
        weight_hash(shared("gpt2", "bridge", tokenizer_folder, dtype))
        for dtype in (torch.float32, torch.float64)
    }
    assert len(hashes) == 2


def test_another_model_is_refused_with_both_hashes(tokenizer_folder):
    view, other = (
        shared("gpt2", "bridge", tokenizer_folder),
        other_weights("gpt2", tokenizer_folder),
    )
    provenance = provenance_of(view, examples(), options={})
    provenance.check_model(view, "this")
    with pytest.raises(ArtifactError) as caught:
        provenance.check_model(other, "this circuit")
    message = str(caught.value)
    assert message.startswith("this circuit")
    assert weight_hash(view)[:12] in message
    assert weight_hash(other)[:12] in message
    assert "\n" not in message


def test_it_says_what_was_run(tokenizer_folder):
    view, data = shared("llama", "bridge", tokenizer_folder), examples()
    found = provenance_of(view, data, options={"rules": {"norm": "frozen"}}, seed=3)
    assert found.model == "tiny-llama"
    assert found.model_hash == weight_hash(view)
    assert dict(found.model_shape) == {
        "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 64, "parallel": False,
    }  # fmt: skip
    assert (found.task, found.task_hash, found.seed) == (data.name, data.hash, 3)
    assert found.examples == {"positive": 3, "neutral": 1, "negative": 2}
    assert found.options == {"rules": {"norm": "frozen"}}
    assert datetime.fromisoformat(found.created).tzinfo is not None
    assert set(found.versions) == set(versions())


def test_it_survives_json(tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder)
    provenance = provenance_of(view, examples(), options={"heads": ["L0H1"], "eps": 1e-8})
    assert Provenance.from_dict(json.loads(json.dumps(provenance.to_dict()))) == provenance


def test_versions_of_what_the_numbers_depend_on():
    found = versions()
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert {"cdt_lens", "torch", "transformer_lens", "transformers"} <= set(found)
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["transformer_lens"][0].isdigit()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/bin/cdt-lens", "score", "--k", "3"], "cdt-lens score --k 3"),
        (["/usr/bin/cdt-lens", "show", "caf\udce9"], r"cdt-lens show 'caf\udce9'"),
        (["/home/someone/notebook.py", "secret"], "python"),
        ([], "python"),
    ],
)
def test_only_our_own_command_line_is_noted(argv, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == expected


def test_weights_that_do_not_change_are_hashed_once(tokenizer_folder, monkeypatch):
    from cdt_lens.models import provenance

    one = ModelView(wrap("gpt2", "bridge", tokenizer_folder, torch.float32))
    other = other_weights("gpt2", tokenizer_folder, torch.float32)
    hashed, true = [], provenance._hashed
    monkeypatch.setattr(provenance, "_hashed", lambda view: (hashed.append(view), true(view))[1])
    with hashed_once():
        found = [weight_hash(view) for view in (one, other, ModelView(one.tl), other)]
        assert found == [true(one), true(other)] * 2 and found[0] != found[1]
        assert hashed == [one, other]
    # Afterwards a change is seen again, also when what stood in the `with` raised.
    with pytest.raises(KeyError), hashed_once():
        raise KeyError
    one.tl.embed.weight.detach()[5, 5] += 1.0
    assert weight_hash(one) != found[0]
