"""Exact mean-ablation against interventions made with TransformerLens' own hooks."""

from __future__ import annotations

import pytest
import torch
from saved import TEMPLATE, VERBALIZER, save_model, write_task
from wrapped import BACKENDS

from cdt_lens.attribution import exact_ablation
from cdt_lens.baselines import mean_activations
from cdt_lens.datasets import task_from_files
from cdt_lens.heads import Head
from cdt_lens.loading import load_model


def by_hand(model, example, head, values):
    """The task direction with one head's z set to `values` [pos, d_head], one prompt at a time."""

    def ablate(z, hook):
        z = z.clone()
        z[:, :, head.head] = values
        return z

    tokens = torch.tensor([example.tokens])
    name = f"blocks.{head.layer}.attn.hook_z"
    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, ablate)])[0, -1]
    return logits[list(example.answers)].mean() - logits[list(example.others)].mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_an_intervention_by_hand(family, backend, tmp_path):
    model = load_model(save_model(tmp_path / "tiny", family), backend=backend)
    task = task_from_files(
        write_task(tmp_path / "data"), tokenizer=model.tokenizer, template=TEMPLATE,
        verbalizer=VERBALIZER,
    )  # fmt: skip
    data = task.valid[:6]
    baseline = mean_activations(model, task.train, progress=False)
    scores = exact_ablation(model, data, baseline, batch_size=4, rows=5, progress=False)
    for i, example in enumerate(data):
        plain = model(torch.tensor([example.tokens]))[0, -1]
        full = plain[list(example.answers)].mean() - plain[list(example.others)].mean()
        for head in (Head(0, 0), Head(0, 3), Head(1, 1), Head(1, 2)):
            rest, answer = baseline.means[head.layer, :, head.head]
            values = rest.repeat(len(example.tokens), 1)
            values[-1] = answer
            with torch.no_grad():
                expected = full - by_hand(model, example, head, values)
            found = scores.per_example[i, head.layer, head.head]
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-5)
    assert scores.method == "mean-ablation"
