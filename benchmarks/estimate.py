"""Compare estimates of head scores with the whole sweep: agreement, errors and cost.

The truth is the two-ended sweep over all prompts. It takes most of an hour for each task on two
cores; an interrupted run resumes in `--out`. An estimate is then drawn with several seeds. Usage:
`python benchmarks/estimate.py models/smollm2-135m --task ioi --out runs/truth`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr

import cdt_lens as cdt
from cdt_lens.circuits.head_scores import HeadScores
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
