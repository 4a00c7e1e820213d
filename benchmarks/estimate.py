"""Compare estimates of head scores with the whole sweep: agreement, errors and cost.

The truth is the two-ended sweep over all prompts. It takes most of an hour for each task on two
cores; an interrupted run resumes in `--out`. An estimate is then drawn with several seeds. Last,
samples of the sweep's own values are drawn again and again: at random and spread over the
first-order effects, and with the sweep going on only where the top tenth is open. Usage:
`python benchmarks/estimate.py models/smollm2-135m --task ioi --out runs/truth`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

import cdt_lens as cdt
from cdt_lens.circuits.head_scores import HeadScores, combined
from cdt_lens.circuits.sampled import sample_order
from cdt_lens.scoring.estimate import EXACT
from cdt_lens.scoring.methods import METHODS


def main() -> None:
    """Print one line for the sweep, and one for each seed of the estimate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--exact", type=int, nargs="+", default=[EXACT])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=40, help="of the samples that are simulated")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = cdt.load_model(options.model)
    task = cdt.load_task(options.task, tokenizer=model.tokenizer, n=(512, 256, 256))
    baseline = cdt.mean_activations(model, task.train, progress=False)
    data = task.train.balanced(options.prompts)
    truth = whole_sweep(model, data, baseline, options.out, options.task)
    layers, heads = truth.values.shape
    price = METHODS["cdt:two-ended"].cost(layers, heads) * len(data)
    print(f"{options.task}: sweep over {len(data)} prompts, {price:.0f} forward passes")
    method = METHODS["estimate:two-ended"]
    for exact in options.exact:
        found = []
        for seed in range(options.seeds):
            began = time.perf_counter()
            scores = cdt.score_heads(model, data, baseline, exact=exact, seed=seed, progress=False)
            seconds = time.perf_counter() - began
            found.append(agreement(scores, truth))
            returns = int((~torch.isnan(scores.corrections[1][:, 0, 0])).sum())
            half = METHODS["exact"].cost(layers, heads)
            cost = method.cost(layers, heads) * len(data) + half * (exact + returns)
            print(
                f"  {exact} exact, seed {seed}: Spearman {found[-1][0]:.3f} "
                f"(shrunk {found[-1][1]:.3f}), standard error {found[-1][2]:.2f} of the sweep's, "
                f"{cost / price:.3f} of its passes, {seconds:.0f} s",
                flush=True,
            )
        means = [statistics.fmean(column) for column in zip(*found, strict=True)]
        print(
            f"  {exact} exact, mean: Spearman {means[0]:.3f} (shrunk {means[1]:.3f}), "
            f"standard error {means[2]:.2f} of the sweep's"
        )
    if scores.cheap is not None:
        redraw(scores.cheap, truth, options.draws)


def redraw(cheap: Tensor, truth: HeadScores, draws: int) -> None:
    """Draw samples of the truth's own values, and print how far the estimates are from it."""
    total = cheap.flatten(1).sum(1).tolist()
    for size in (8, 15, 30):
        for name, key in (("at random", None), ("spread", total)):
            found = [estimate_of(cheap, truth, (size,), seed, key)[:2] for seed in range(draws)]
            error, spearman = (statistics.fmean(column) for column in zip(*found, strict=True))
            print(
                f"  {size} of {len(total)} {name}: Spearman {spearman:.3f}, root mean square error "
                f"of the largest tenth {error:.4f} logits"
            )
    tenth = truth.values.numel() // 10
    for ends in ((15,), (30,), (60,), (7, 15, 30), (15, 30, 60)):
        found = [estimate_of(cheap, truth, ends, seed, total)[2:] for seed in range(draws)]
        shared, swept = (statistics.fmean(column) for column in zip(*found, strict=True))
        print(
            f"  rounds to {', '.join(map(str, ends))}: {shared:.1f} of the {tenth} largest heads, "
            f"{swept:.1f} exact prompts a head"
        )


def estimate_of(
    cheap: Tensor, truth: HeadScores, ends: tuple[int, ...], seed: int, key: list[float] | None
) -> tuple[float, float, float, float]:
    """Return error, rank correlation, shared top heads, and exact prompts a head of one sample."""
    order = sample_order(truth.example_labels, seed, key)
    exact, tenth = truth.per_example - cheap, truth.values.numel() // 10
    known = torch.full_like(exact, torch.nan)
    open_heads = torch.ones_like(truth.values, dtype=torch.bool)
    for start, end in zip((0, *ends), ends, strict=False):
        known[order[start:end]] = torch.where(open_heads, exact[order[start:end]], torch.nan)
        scores = combined(
            cheap, (known,), truth.example_labels, direction=truth.direction, method="simulated",
            provenance=truth.provenance, looks=len(ends),
        )  # fmt: skip
        open_heads = torch.zeros_like(open_heads)
        for head in scores.undecided(k=tenth):
            open_heads[head.layer, head.head] = True
    largest = truth.values.abs().flatten().topk(tenth).indices
    error = (scores.values - truth.values).flatten()[largest].square().mean().sqrt()
    rank = spearmanr(scores.values.flatten(), truth.values.flatten()).statistic
    shared = len(set(scores.top(tenth)) & set(truth.top(tenth)))
    swept = (~torch.isnan(known)).sum() / truth.values.numel()
    return float(error), float(rank), float(shared), float(swept)


def whole_sweep(
    model: object, data: cdt.Examples, baseline: cdt.Baseline, out: Path, task: str
) -> HeadScores:
    """Return the sweep over all prompts, kept in `out`."""
    path = out / f"{task}.json"
    if path.exists():
        truth = HeadScores.load(path)
        if truth.provenance.task_hash == data.hash:
            return truth
    out.mkdir(parents=True, exist_ok=True)
    truth = cdt.score_heads(
        model, data, baseline, exact="all", batch_size=8, checkpoint=out / f"{task}.partial.json"
    )
    truth.save(path)
    return truth


def agreement(scores: HeadScores, truth: HeadScores) -> tuple[float, float, float]:
    """Return the rank correlations of the scores and of shrunk ones, and the ratio of errors.

    The ratio is the median over the tenth of the heads with the largest scores.
    """
    exact = truth.values.flatten()
    largest = exact.abs().topk(len(exact) // 10).indices
    ratio = (scores.stderr.flatten()[largest] / truth.stderr.flatten()[largest]).median()
    by_rank = (
        float(spearmanr(each.values.flatten(), exact).statistic)
        for each in (scores, scores.shrunk())
    )
    return (*by_rank, float(ratio))


if __name__ == "__main__":
    main()
