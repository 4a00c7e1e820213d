"""Low-rank adapters: peft's layers trained by the loop, against A and B by hand; merged exactly."""

from __future__ import annotations

import sys
from typing import Any, get_args

import peft
import pytest
import torch
from helpers.checks import assert_same_bits, left_untouched
from helpers.shared import BRIDGE_FAMILIES
from helpers.tiny_models import Float64Throughout, build, prompts
from helpers.tiny_training import QUICK, task, values
from helpers.wrapped import needs_hooked, view, wrap
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from cdt_lens.core.choices import LoraModules
from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.finetuning.lora import LowRank, parameters_of_rank
from cdt_lens.finetuning.options import TrainingOptions
from cdt_lens.finetuning.trainer import Trainer, _rates, epoch_batches
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import named_weights

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def names_of(seen: ModelView, modules: LoraModules = "attention") -> list[str]:
    names = [f"blocks.{layer}.attn.W_{r}" for layer in range(seen.n_layers) for r in "QKVO"]
    if modules == "attention":
        return names
    return names + [n for n in named_weights(seen) if ".mlp.W_" in n]


def disturb(low: LowRank) -> None:
    """B starts at 0, so that nothing would be seen; give it values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for master in low.masters:
            noise = torch.randn(master.value.shape, generator=generator)
            master.value.copy_(0.1 * noise)


@pytest.mark.parametrize("modules", get_args(LoraModules))
@pytest.mark.parametrize("family", BRIDGE_FAMILIES)
def test_what_is_learnt_is_merged_exactly_and_taken_out(family, modules, tokenizer_folder):
    """Fused projections and Conv1D included: the merged weights give the logits of peft's layers."""
    seen = view(family, "bridge", tokenizer_folder)
    tokens, plain = prompts(), seen.logits(prompts())
    before = values(seen)
    with left_untouched(seen.tl):
        low = LowRank(seen, rank=3, alpha=6, seed=1, modules=modules)
        assert sum(m.value.numel() for m in low.masters) == 3 * parameters_of_rank(seen, modules)
        assert torch.equal(seen.logits(tokens), plain)  # B is 0: the model is as it was
        disturb(low)
        trained = seen.logits(tokens)
        learnt = low.learnt()
    assert torch.equal(seen.logits(tokens), plain)
    assert set(learnt.whole) == set(names_of(seen, modules)) and not learnt.slices
    weights = named_weights(seen)
    for name, value in learnt.whole.items():
        assert_same_bits(weights[name], before[name])
        delta = value - before[name]
        flat = delta
        if ".attn." in name:
            flat = delta.flatten(0, 1) if name[-1] == "O" else delta.transpose(0, 1).flatten(1)
        singular = torch.linalg.svdvals(flat)
        # Peft keeps A and B in float32.
        assert float(singular[2]) > 1e-3 and float(singular[3]) < 1e-6 * float(singular[0]), name
        weights[name].copy_(value)
    # 1e-5: both in float32 steps of about 1; without the merge they differ by 0.1 and more.
    torch.testing.assert_close(seen.logits(tokens), trained, rtol=0, atol=1e-5)
    assert float((trained - plain).abs().max()) > 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2", "pythia"])
def test_only_a_and_b_are_trained(family, tokenizer_folder):
    seen = view(family, "bridge", tokenizer_folder, torch.float32)
    parameters = list(seen.tl.parameters())
    low = LowRank(seen, rank=2)
    try:
        assert len(low.masters) == seen.n_layers * 4 * 2
        with low.attached(), seen.quiet(gradients=True):
            passes = AnswerPass(seen)
            for batch in task().train.batches(5):
                passes(batch).square().sum().backward()
            assert all(m.value.grad is not None for m in low.masters)
            assert all(p.grad is None for p in parameters)
            assert not any(p.requires_grad for p in parameters)
        assert all(m.decay for m in low.masters)
    finally:
        low.restore()
    assert not any("lora" in name for name, _ in seen.tl.original_model.named_modules())
    assert not hasattr(seen.tl.original_model, "peft_config")


def literal(model: Any, start: dict[str, Tensor], options: TrainingOptions, data: Any) -> Any:
    """W + (alpha / rank) B A in place of each projection; AdamW over the As and Bs."""
    parts = {n: v.clone().requires_grad_(True) for n, v in start.items()}
    adam = torch.optim.AdamW(parts.values(), weight_decay=options.weight_decay)
    plan = [b for e in range(options.epochs) for b in epoch_batches(data.train, options, e)]
    rate = _rates(options, len(plan))
    names = [n.removesuffix(".lora_A") for n in parts if n.endswith(".lora_A")]
    state = {n: p.detach() for n, p in model.named_parameters()}

    def merged() -> dict[str, Tensor]:
        scale = options.lora_alpha / options.lora_rank
        return state | {
            f"{n}.weight": state[f"{n}.weight"]
            + scale * parts[f"{n}.lora_B"] @ parts[f"{n}.lora_A"]
            for n in names
        }

    for step, batch in enumerate(plan):
        adam.zero_grad()
        loss = torch.zeros(())
        for i in batch:
            item = data.train[i]
            out = functional_call(model, merged(), (torch.tensor([item.tokens]),)).logits[0, -1]
            loss = loss + cross_entropy(out[[*item.answers, *item.others]], torch.tensor(0))
        (loss / len(batch)).backward()
        norm = torch.stack([p.grad.square().sum() for p in parts.values()]).sum().sqrt()
        for p in parts.values():
            p.grad *= torch.clamp(options.clip / (norm + 1e-6), max=1.0)
        adam.param_groups[0]["lr"] = rate(step)
        adam.step()
    return {name: value.detach() for name, value in merged().items()}


def test_equals_low_rank_adaptation_by_hand(tokenizer_folder):
    given = {k: v for k, v in QUICK.items() if k != "progress"}
    options = TrainingOptions(**given, lora_rank=3, lora_alpha=5)
    data = task(valid=0)
    with Float64Throughout():
        seen = view("llama", "bridge", tokenizer_folder)
        low = LowRank(seen, rank=3, alpha=5, seed=0)
        for master in low.masters:
            master.value.data = master.value.data.double()
        start = {
            m.name.replace("_original_component.", "").replace("._original_component", ""): (
                m.value.detach().clone()
            )
            for m in low.masters
        }
        with low.attached():
            Trainer(AnswerPass(seen), low, data, options, progress=False).run()
        found = low.learnt().whole
        expected = literal(build("llama"), start, options, data)
    for layer in range(2):
        for role, projection in zip("QKVO", PROJECTIONS, strict=True):
            weight = expected[f"model.layers.{layer}.self_attn.{projection}.weight"]
            mine = found[f"blocks.{layer}.attn.W_{role}"]
            flat = mine.flatten(0, 1).T if role == "O" else mine.transpose(1, 2).flatten(0, 1)
            assert float((flat - weight).abs().max()) < 1e-9, (layer, role)


def test_rank_and_scale_are_the_options(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    given = {**QUICK, "scope": "lora"}
    small, large = (finetune(seen, task(), lora_rank=rank, **given) for rank in (1, 4))
    assert large.trained_parameters == 4 * small.trained_parameters
    assert small.trained_parameters == 2 * (2 * (64 + 64) + 2 * (64 + 32))
    assert small.adapter.elements == 2 * (2 * 64 * 64 + 2 * 64 * 32)


def test_half_precision_models_get_float32_adapters(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.bfloat16)
    low = LowRank(seen)
    assert {m.value.dtype for m in low.masters} == {torch.float32}
    disturb(low)
    assert {v.dtype for v in low.learnt().whole.values()} == {torch.bfloat16}


@needs_hooked
def test_a_hooked_transformer_is_refused(tokenizer_folder):
    seen = view("llama", "hooked", tokenizer_folder)
    with pytest.raises(UnsupportedModelError, match="'lora' needs a TransformerBridge"):
        LowRank(seen)


def test_without_peft_it_says_what_to_install(tokenizer_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        LowRank(view("llama", "bridge", tokenizer_folder))


def test_peft_layers_of_the_caller_are_refused_before_anything_changes(tokenizer_folder):
    model = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    root = model.original_model
    names = [n for n, m in root.named_modules() if isinstance(m, torch.nn.Linear) and "v_proj" in n]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    peft.inject_adapter_in_model(config, root)
    model(torch.arange(3, 9)[None])  # a bridge attaches hooks of its own at its first run
    with left_untouched(model), pytest.raises(InputError, match="peft layers of your own"):
        finetune(model, task(), scope="lora", **QUICK)
