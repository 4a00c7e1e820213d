"""Peak memory of scoring for each token, in vectors of d_model numbers, beside the weights.

    python benchmarks/live_tensors.py

Counts the bytes of live tensors in random Llamas with d_mlp = 3.5 d_model. The peak grows with the
number of layers and not with the width, so that it can be carried over to a larger model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import transformers
from sweep import _tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.models.loading import bridge_of, third_party_noise_off
from cdt_lens.scoring.one_pass import one_pass
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.task import Example, Examples

N_PROMPTS, N_ROWS = 8, 32


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that come into being; those of `known` storages do not count."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, address: int) -> None:
        self.now -= self.sizes.pop(address, 0)


def model(n_layers: int, d_model: int) -> Any:
    """A random Llama as a bridge."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=d_model, intermediate_size=7 * d_model // 2,
        num_hidden_layers=n_layers, num_attention_heads=d_model // 32,
        num_key_value_heads=d_model // 64, max_position_embeddings=256, bos_token_id=1,
        eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    hf_model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    with third_party_noise_off():
        return bridge_of(hf_model, _tokenizer())


def prompts(n_tokens: int) -> Examples:
    """Random prompts with two labels."""
    tokens = torch.randint(3, 128, (N_PROMPTS, n_tokens)).tolist()
    items = [
        Example(str(i), tuple(row), ("a", "b")[i % 2], (20 + i % 2,), (21 - i % 2,))
        for i, row in enumerate(tokens)
    ]
    return Examples(tuple(items), ("a", "b"), "random")


def vectors(tl: Any, call: Callable[[], Any], rows: int, n_tokens: int) -> float:
    """The peak in vectors of d_model numbers for each row and token."""
    call()
    known = [*tl.original_model.parameters(), *tl.original_model.buffers()]
    with Live(known) as live:
        call()
    return live.peak / 4 / rows / n_tokens / int(tl.cfg.d_model)


def report(tl: Any, n_tokens: int) -> None:
    """Print the peaks of a sweep and of one pass."""
    data = prompts(n_tokens)
    baseline = mean_activations(tl, data, progress=False)

    def sweep() -> Any:
        return score_heads(tl, data, baseline, rows=N_ROWS, batch_size=N_PROMPTS, progress=False)

    def once() -> Any:
        return one_pass(tl, data, baseline, slopes="gradient", batch_size=N_PROMPTS, progress=False)

    swept, passed = vectors(tl, sweep, N_ROWS, n_tokens), vectors(tl, once, N_PROMPTS, n_tokens)
    print(f"{tl.cfg.n_layers:6} {tl.cfg.d_model:8} {n_tokens:7} {swept:15.1f} {passed:20.1f}")


def main() -> None:
    print("layers  d_model  tokens  sweep (stable)  one pass (gradient)")
    for n_layers, d_model in ((4, 128), (8, 128), (4, 256)):
        tl = model(n_layers, d_model)
        for n_tokens in (32, 64):
            report(tl, n_tokens)


if __name__ == "__main__":
    main()
