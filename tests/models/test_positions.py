"""Windows and rotary embeddings are right at every length, and no number depends on the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checks import assert_close
from helpers.tiny_models import _GROUPED, D_VOCAB, _randomise as randomise
from helpers.tiny_tasks import examples
from helpers.tiny_training import QUICK, task
from helpers.wrapped import needs_hooked, tokenizer

import cdt_lens as cdt
from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.core.errors import CdtLensError, InputError, UnsupportedModelError
from cdt_lens.models.loading import has_hooked_transformer, load_model
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.edge_scores import score_edges
from cdt_lens.tasks.evaluate import label_prior
from cdt_lens.tasks.task import Task

CONTEXT = 900
LIMIT = 20  # of the longrope model
_LONG = {**_GROUPED, "max_position_embeddings": CONTEXT}
_FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
_QWEN = {**_LONG, "use_sliding_window": True, "max_window_layers": 0}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, **more}


def llama(**changed: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_LONG, **changed}))


def longrope(limit: int, **more: Any) -> dict[str, Any]:
    return rope(
        "longrope", original_max_position_embeddings=limit, attention_factor=1.0,
        **{**_FACTORS, **more},
    )  # fmt: skip


# What acts only beyond the 64 random tokens, and beyond the 512 that are run at most.
MODELS: dict[str, Callable[[], Any]] = {
    "qwen2, window 80": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_QWEN, sliding_window=80)
    ),
    "qwen3, window 700": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**_QWEN, head_dim=16, sliding_window=700)
    ),
    "qwen2, window in one layer": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**{**_QWEN, "max_window_layers": 1}, sliding_window=700)
    ),
    "mistral, window 700": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**_LONG, sliding_window=700)
    ),
    "gemma2, window 80": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_LONG, head_dim=16, sliding_window=80)
    ),
    "longrope, 100": lambda: llama(rope_parameters=longrope(100)),
    "longrope, 700": lambda: llama(rope_parameters=longrope(700)),
    "longrope, longest alone": lambda: llama(
        rope_parameters=longrope(700, long_factor=[1.0] * 7 + [40.0])
    ),
    "llama3": lambda: llama(
        rope_parameters=rope(
            "llama3", factor=1.01, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=700,
        )
    ),
    "yarn": lambda: llama(
        rope_parameters=rope("yarn", factor=1.01, original_max_position_embeddings=700)
    ),
    "linear": lambda: llama(rope_parameters=rope("linear", factor=1.0005)),
    "dynamic": lambda: llama(rope_parameters=rope("dynamic", factor=4.0)),
    "phi3, longrope": lambda: phi3(100),
}  # fmt: skip


def phi3(limit: int) -> Any:
    config = transformers.Phi3Config(
        **_LONG, original_max_position_embeddings=limit, rope_parameters=longrope(limit)
    )
    return transformers.Phi3ForCausalLM(config)


def saved(model: Any, folder: Path, words: str) -> Path:
    model = model.eval().requires_grad_(False)
    randomise(model, torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_every_length_within_the_context_is_read_right_or_refused(name, tmp_path, tokenizer_folder):
    with torch.random.fork_rng():
        model = MODELS[name]()
    folder = saved(model, tmp_path, tokenizer_folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    read = set()
    for backend in ("hooked", "bridge", "auto") if has_hooked_transformer() else ("bridge",):
        try:
            view = ModelView(load_model(folder, backend=backend))
        except UnsupportedModelError:
            continue
        read.add(backend)
        # In both orders: a rotary embedding may keep something of the prompt before.
        for length in (CONTEXT, 50, 300, CONTEXT):
            tokens = torch.arange(length)[None] * 7 % 120 + 3
            with torch.no_grad():
                expected = plain.eval()(tokens).logits
            assert_close(view.logits(tokens), expected, atol=2e-3)
    assert {"bridge"} <= read
    assert "auto" in read or not has_hooked_transformer()


_HOOKED_ONLY: dict[str, Callable[[], Any]] = {
    "gptj": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=D_VOCAB, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, rotary_dim=4,
            bos_token_id=1, eos_token_id=2,
        )
    ),
    "gpt_neo, window 80": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=D_VOCAB, max_position_embeddings=CONTEXT, hidden_size=32, num_layers=2,
            num_heads=4, attention_types=[[["global", "local"], 1]], window_size=80,
            bos_token_id=1, eos_token_id=2,
        )
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=D_VOCAB, max_position_embeddings=CONTEXT, hidden_size=32, ffn_dim=48,
            num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )
    ),
}  # fmt: skip


@needs_hooked
@pytest.mark.parametrize("name", _HOOKED_ONLY)
def test_every_length_of_a_family_that_only_hooked_transformer_reads(
    name, tmp_path, tokenizer_folder
):
    with torch.random.fork_rng():
        folder = saved(_HOOKED_ONLY[name](), tmp_path, tokenizer_folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    view = ModelView(load_model(folder))
    for length in (CONTEXT, 50, 300):
        tokens = torch.arange(length)[None] * 7 % 120 + 3
        with torch.no_grad():
            assert_close(view.logits(tokens), plain.eval()(tokens).logits, atol=2e-3)


@needs_hooked
def test_a_window_that_hooked_transformer_applies_is_no_reason_to_refuse(
    tmp_path, tokenizer_folder
):
    folder = saved(MODELS["mistral, window 700"](), tmp_path, tokenizer_folder)
    assert type(load_model(folder, backend="hooked")).__name__ == "HookedTransformer"
    short = load_model(
        saved(MODELS["qwen3, window 700"](), tmp_path / "b", tokenizer_folder), n_ctx=600
    )
    assert type(short).__name__ == "HookedTransformer"  # the window never acts


# Batches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tokenizer_folder) -> tuple[Any, Task]:
    """A longrope model, and prompts on both sides of its limit."""
    folder = saved(phi3(LIMIT), tmp_path_factory.mktemp("longrope"), tokenizer_folder)
    data = examples((9, LIMIT, 25, LIMIT + 1, 7, 30), name="mixed")
    return load_model(folder), replace(task(), train=data, valid=data, test=data)


Number = Callable[[Any, Task, int], torch.Tensor]


def _baseline(model: Any, data: Any, size: int = 1) -> Any:
    return cdt.mean_activations(model, data, batch_size=size, progress=False)


def _scores(method: str) -> Number:
    def numbers(model: Any, data: Task, size: int) -> torch.Tensor:
        scored = cdt.score_by(
            method, model, data.train, _baseline(model, data.train), batch_size=size, progress=False
        )
        return torch.cat([scored.values.flatten(), torch.tensor([scored.direction])])

    return numbers


def _circuit(model: Any, data: Task, size: int) -> torch.Tensor:
    metric = circuit_metric(
        model, [["L0H1"]], data.train, _baseline(model, data.train), batch_size=size,
        progress=False,
    )  # fmt: skip
    return torch.as_tensor(metric)


def _edges(model: Any, data: Task, size: int) -> torch.Tensor:
    scored = score_edges(
        model, data.train, cdt.mean_activations(model, data.train, mlps=True, progress=False),
        batch_size=size, progress=False,
    )  # fmt: skip
    return torch.tensor(scored.to_dataframe()["score"].tolist())


def _training(model: Any, data: Task, size: int, **more: Any) -> torch.Tensor:
    options = {**QUICK, "batch_size": 6, "micro_batch": size, "eval_batch_size": size, **more}
    result = cdt.finetune(model, data, heads=["L1H2"], scope="decision", **options)
    return torch.tensor(result.history[["train_loss", "target_loss"]].to_numpy().tolist())


NUMBERS: dict[str, Number] = {
    "evaluate": lambda model, data, size: torch.tensor(
        [cdt.evaluate(model, data.train, batch_size=size).loss]
    ),
    "baseline": lambda model, data, size: _baseline(model, data.train, size).means,
    "stable": _scores("one-pass:stable"),
    "exact": _scores("exact"),
    "cdt": _scores("cdt:two-ended"),
    "random": _scores("random"),
    "circuit": _circuit,
    "edges": _edges,
    "training": _training,
    "training from a layer on": functools.partial(_training, keep_frozen=True, norms="none"),
}


@pytest.mark.filterwarnings("ignore:.*are also in")
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_depends_on_the_batches(name, mixed):
    """Longrope takes its factors by the width of the batch; a prompt must see those of its own."""
    one_by_one, together = (NUMBERS[name](*mixed, size).double() for size in (1, 6))
    assert_close(together, one_by_one, atol=1e-4)


def test_prompts_of_both_kinds_do_not_fit_into_one_decomposition(mixed):
    model, data = mixed
    with pytest.raises(InputError, match=f"more than {LIMIT} tokens.*two calls"):
        cdt.decompose(model, data.train, [["L0H1"]], _baseline(model, data.train))
    cdt.decompose(model, data.train[:2], [["L0H1"]], _baseline(model, data.train))


def test_the_label_prior_is_of_one_kind_of_prompts(mixed):
    model, data = mixed
    with pytest.raises(CdtLensError, match="longrope"):
        label_prior(model, replace(data, content_free=data.train))
