"""Score every head by the gradient of a training loss: how much training would move its slices.

The mean gradient over the training examples is taken once, at the untouched model. A head's signal
is the sum of the magnitudes over its slices. A key/value slice that several query heads share
counts for each of them, because training any of them trains it.

Which heads such a signal finds is measured in docs/results/adaptation.md.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, HeadChoice, KeyValue, Ranking
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.slices import KEY_VALUE_ROLES, head_slices
from cdt_lens.finetuning.trainable import SlicesAndWholes
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.models.words import among
from cdt_lens.tasks.metrics import answer_loss
from cdt_lens.tasks.task import Examples


@checked_arguments
@uses_model
def training_signal(
    model: nn.Module | ModelView, examples: Examples, *, kv: KeyValue = "shared",
    batch_size: Count = 16,
) -> Float[Tensor, "layer head"]:  # fmt: skip
    """Compute for every head the L1 norm of the training loss' gradient over the head's slices.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to train on. The loss is the mean cross-entropy over the candidates.
        kv: How shared key/value slices count, as in `slices.head_slices`; "skip" leaves them out.
        batch_size: Number of examples in one forward and backward pass.

    Returns:
        The norms, in nats per unit of weight. All are at least 0.

    Raises:
        InputError: There are no examples.
        UnsupportedModelError: A weight of a head is missing or tied.
    """
    view = view_of(model)
    heads = all_heads(view.n_layers, view.n_heads)
    trained = SlicesAndWholes(view, head_slices(view, heads, kv=kv))
    passes = AnswerPass(view)
    with trained.attached(), view.quiet(gradients=True):
        for batch in examples.batches(batch_size, apart=view.longrope_limit):
            logits = passes(batch)
            moved = batch.to(logits.device)
            candidates = among(logits, moved.candidates)
            loss = answer_loss(candidates, moved.is_answer, moved.is_candidate).sum()
            (loss / len(examples)).backward()
    signal = torch.zeros(view.n_layers, view.n_heads, dtype=torch.float64)
    masters = {master.name: master.value for master in trained.masters}
    group = view.n_heads // view.n_kv_heads
    for part in trained.slices:
        gradient = masters[part.name].grad
        if gradient is None:
            continue
        norms = gradient.double().abs().flatten(1).sum(1).cpu()
        shared = part.role in KEY_VALUE_ROLES
        signal[part.layer] += norms.repeat_interleave(group) if shared else norms
    return signal.float()


def choose_heads(
    scores: HeadScores, k: int, by: Ranking, choice: HeadChoice, signal: Tensor | None
) -> Circuit:
    """Return a circuit of `k` heads, chosen by scores, by a training signal or by both.

    Args:
        scores: The scores of the proxy model's heads.
        k: Number of heads.
        by: Whether the scores rank by magnitude or signed.
        choice: "circuit" takes the first of that ranking, "gradient" the largest signals, "both"
            the largest sums of the logarithms of score magnitude and signal, each standardised over
            the heads.
        signal: What `training_signal` returned for the target; None for "circuit".

    Returns:
        The circuit, with the scores.
    """
    if choice == "circuit" or signal is None:
        return scores.select(k=k, by=by)
    value = _standardised(signal)
    if choice == "both":
        value = value + _standardised(scores.values.abs())
    order = (
        value.nan_to_num(nan=-torch.inf)
        .flatten()
        .argsort(descending=True, stable=True)[:k]
        .tolist()
    )
    heads = [Head(i // scores.n_heads, i % scores.n_heads) for i in order]
    return scores.circuit(heads, {"k": k, "heads": choice})


def _standardised(values: Tensor) -> Tensor:
    # The logarithm of a head that does nothing is -inf: it comes last, and moves no other head.
    logs = values.double().log()
    known = logs[logs.isfinite()]
    return (logs - known.mean()) / known.std()
