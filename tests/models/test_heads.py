from __future__ import annotations

import pytest
import torch

from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import Head, all_heads, check_heads, heads_to_mask, mask_to_heads


@pytest.mark.parametrize("text", ["L9H6", "l9h6", " L9 H6 ", "9.6", " 9.6 "])
def test_a_head_is_read_in_either_form(text: str):
    assert Head.parse(text) == Head(9, 6)


@pytest.mark.parametrize("head", [Head(0, 0), Head(12, 3), Head(3, 128)])
def test_print_and_read_are_inverse(head: Head):
    assert Head.parse(str(head)) == head


@pytest.mark.parametrize("text", ["", "L9", "H6", "9", "9.6.1", "L9H6H1", "L-1H0", "L1.5H0", "9,6"])
def test_another_form_is_refused_with_the_form_to_use(text: str):
    with pytest.raises(InputError, match="L9H6") as caught:
        Head.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(("layer", "head"), [(-1, 0), (0, -1)])
def test_a_negative_index_is_refused(layer: int, head: int):
    with pytest.raises(InputError, match="0 upwards"):
        Head(layer, head)


def test_heads_are_ordered_by_layer_then_head():
    heads = [Head(1, 0), Head(0, 10), Head(0, 9), Head(10, 0), Head(2, 0)]
    assert sorted(heads) == [Head(0, 9), Head(0, 10), Head(1, 0), Head(2, 0), Head(10, 0)]


def test_check_heads_sorts_and_drops_repeats():
    assert check_heads([Head(1, 2), Head(0, 1), Head(1, 2)], 2, 3) == (Head(0, 1), Head(1, 2))
    assert check_heads([], 2, 3) == ()


@pytest.mark.parametrize("head", [Head(2, 0), Head(0, 3)])
def test_a_head_outside_the_model_is_refused_by_name(head: Head):
    for function in (check_heads, heads_to_mask):
        with pytest.raises(InputError, match=f"{head}.*layers 0-1 of heads 0-2"):
            function([head], 2, 3)


def test_mask_and_heads_are_inverse():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        mask = torch.rand(4, 7, generator=generator) < 0.3
        heads = mask_to_heads(mask)
        assert list(heads) == sorted(heads)
        assert torch.equal(heads_to_mask(heads, 4, 7), mask)
    assert heads_to_mask([], 2, 3).sum() == 0


def test_all_heads_are_the_full_mask():
    assert len(all_heads(3, 5)) == 15
    assert bool(heads_to_mask(all_heads(3, 5), 3, 5).all())
    assert list(all_heads(3, 5)) == sorted(all_heads(3, 5))
