"""What the backward pass needs is kept once, and gradients keep their bits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Container

import pytest
import torch
from helpers.checks import assert_same_bits
from helpers.tiny_tasks import examples
from helpers.wrapped import needs_hooked, view
from torch import Tensor, nn
from torch.nn.functional import linear

from cdt_lens.finetuning import saved_tensors
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.saved_tensors import SavedOnce, _Kept
from cdt_lens.finetuning.trainable import SlicesAndWholes
from cdt_lens.models.weights import own_weights


@pytest.fixture(autouse=True)
def _every_size(monkeypatch):
    monkeypatch.setattr(saved_tensors, "_SMALL", 0)


def kept(but: Container[int] = ()) -> int:
    """Bytes of the tensors that graphs keep through `SavedOnce`, without some storages."""
    storages = [
        each.value.untyped_storage() for each in gc.get_objects() if isinstance(each, _Kept)
    ]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for place, size in sizes.items() if place not in but)


def weight(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(*shape, generator=generator))


def heads_first(w: Tensor) -> Tensor:
    return w.permute(0, 2, 1).reshape(-1, w.shape[1])


@pytest.mark.parametrize(
    ("shape", "copy"),
    [
        ((5, 7), lambda w: w.T.contiguous()), ((2, 5, 3), heads_first),
        ((2, 3, 5), lambda w: w.permute(2, 0, 1).reshape(5, 6).T.clone().T),
        ((7, 5), lambda w: w.clone()),
    ],
)  # fmt: skip
def test_the_copy_of_a_weight_is_made_again(shape, copy: Callable[[Tensor], Tensor]):
    other, parameter = weight(*shape), weight(*shape)
    with torch.no_grad():
        other += 1
    x = torch.ones(4, 5, requires_grad=True)
    found = []
    for context in (torch.enable_grad(), SavedOnce([other, parameter])):
        with context:
            used = copy(parameter)
            out = linear(x, used if used.shape[1] == 5 else used.T).exp()
        del used
        found.append(torch.autograd.grad(out.sum(), [x, parameter]))
        out = out.detach()
    with SavedOnce([other, parameter]):
        used = copy(parameter)
        out = linear(x, used if used.shape[1] == 5 else used.T)
    assert kept() == x.untyped_storage().nbytes()  # the input alone
    del out
    assert kept() == 0
    for one, two in zip(*found, strict=True):
        assert_same_bits(one, two)


def test_equal_tensors_are_kept_once_and_zeros_keep_their_sign():
    x = weight(6)
    with SavedOnce([]):
        equal = (x.clone() * x.clone()).sum() + (x.clone() * x.clone()).sum()
        assert kept() == 6 * 4
        del equal
        signs = torch.zeros(6).mul(-1).requires_grad_() * torch.zeros(6).requires_grad_()
        assert kept() == 2 * 6 * 4
        del signs
    assert kept() == 0


def test_an_edit_in_place_is_told_as_autograd_does():
    x = weight(6)
    with SavedOnce([]):
        y = x.exp()
        z = y * y
    y.detach()[0] = 5.0
    with pytest.raises(RuntimeError, match="modified by an in-?place operation"):
        z.sum().backward()


@needs_hooked
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_gradients_of_a_model_keep_their_bits(family, tokenizer_folder):
    seen = view(family, "hooked", tokenizer_folder, torch.float32)
    batch = next(examples().batches(6))
    weights = {p.untyped_storage().data_ptr() for p in seen.tl.parameters()}
    sizes: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return value.detach()

    found = []
    plain = torch.autograd.graph.saved_tensors_hooks(note, lambda value: value)
    for context in (plain, SavedOnce(seen.tl.parameters())):
        trainable = SlicesAndWholes(seen, (), tuple(own_weights(seen)))
        with trainable.attached(), seen.quiet(gradients=True):
            with context:
                loss = AnswerPass(seen)(batch).square().sum()
            held = kept(but=weights)
            loss.backward()
            found.append({m.name: m.value.grad for m in trainable.masters})
    assert 0 < held < 0.8 * sum(sizes.values())
    for name, value in found[0].items():
        assert_same_bits(found[1][name], value)
