"""Attention patterns and relevance by position, against the model and against `decompose`."""

from __future__ import annotations

import pytest
import torch
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_task

from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.decomposition.decompose import Node, decompose
from cdt_lens.models.heads import Head
from cdt_lens.models.loading import load_model
from cdt_lens.scoring.prompt_views import attention_view, token_relevance
from cdt_lens.tasks.datasets import task_from_files


@pytest.fixture(scope="module")
def model_and_task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    model = load_model(save_model(folder / "tiny"), backend="bridge")
    task = task_from_files(
        write_task(folder / "data"), tokenizer=model.tokenizer, template=TEMPLATE,
        verbalizer=VERBALIZER,
    )  # fmt: skip
    return model, task


def test_attention_is_the_models_pattern(model_and_task):
    model, task = model_and_task
    heads = [Head(1, 3), Head(0, 1)]
    shown = attention_view(model, task.valid[:2], heads)
    assert shown.heads == (Head(0, 1), Head(1, 3))
    for example, pattern, words in zip(task.valid, shown.patterns, shown.prompts, strict=False):
        _, cache = model.run_with_cache(torch.tensor([example.tokens]))
        for row, head in zip(pattern, shown.heads, strict=True):
            own = cache[f"blocks.{head.layer}.attn.hook_pattern"][0, head.head]
            torch.testing.assert_close(row, own, rtol=0, atol=1e-6)
        assert len(words) == len(example.tokens) and words[-1] == "w3"


def test_relevance_is_the_sources_of_one_position(model_and_task):
    model, task = model_and_task
    baseline = mean_activations(model, task.train, progress=False)
    heads = [Head(0, 2), Head(1, 0)]
    found = token_relevance(model, task.valid[:3], heads, baseline)
    for i, relevance in enumerate(found.relevance):
        for position in range(len(relevance)):
            source = [Node(h.layer, h.head, position) for h in heads]
            parts = decompose(model, task.valid[i : i + 1], [source], baseline)
            torch.testing.assert_close(
                relevance[position], parts.relevant_direction[0, 0], rtol=0, atol=1e-5
            )
    parts = decompose(model, task.valid[:3], [[]], baseline)
    own = (parts.logits * parts.direction).sum(-1)
    assert found.directions == pytest.approx(own.tolist(), abs=1e-5)


def test_no_heads_is_refused(model_and_task):
    model, task = model_and_task
    with pytest.raises(InputError, match="at least one head"):
        attention_view(model, task.valid[:1], [])
