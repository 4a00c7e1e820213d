"""Does it matter which heads are trained? Every rule of choice among random sets of as many heads.

    python benchmarks/head_choice.py --out runs/head-choice [--sets 40] [--hours 1]

The demo's model is pre-trained on the spot, and adapted to invented languages at three distances.
Real models: benchmarks/gemma-heads.toml with `cdt-lens transfer`, and --out of that run here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cdt_lens.experiments.demo_model import make_demo_model
from cdt_lens.experiments.transfer import run_transfer
from cdt_lens.experiments.transfer_config import TransferConfig, config_of
from cdt_lens.finetuning.transfer_result import TransferResult

DISTANCES = (0.3, 0.5, 0.8)
SETS = "drawn"


def demo_settings(model: Path, sets: int) -> TransferConfig:
    """The settings of shared measurements: 6 of 32 heads, norms untouched, 6 epochs at 3e-3."""
    six: dict[str, Any] = {"k": 6, "scope": "decision"}
    return config_of(
        {
            "model": str(model),
            "task": {
                "name": "pseudo-sentiment", "source": "source",
                "targets": [str(distance) for distance in DISTANCES], "sizes": [1500, 150, 600],
            },
            "proxy": {"epochs": 8, "batch_size": 32, "learning_rate": 2e-3},
            "discovery": {"examples": 128, "k": 6, "faithfulness_examples": 96},
            "transfer": {
                "scopes": ["decision", "near-zero"], "seeds": [0, 1], "examples": 300,
                "epochs": 6, "learning_rate": 3e-3, "norms": "none", "text_examples": 64,
                "save_adapters": False,
                "learning_rates": {"decision": 3e-3, "near-zero": 3e-3, "random": 3e-3},
                "variants": {
                    "by-gradient": six | {"heads": "gradient"}, "by-both": six | {"heads": "both"},
                    SETS: {"scope": "random", "k": 6, "sets": sets},
                },
            },
        },
        where="head choice",
    )  # fmt: skip


def show(result: TransferResult) -> None:
    """Print the rules among the random sets, and the random sets themselves."""
    placed = result.among(SETS)
    columns = "| target | heads | accuracy | loss (nats) | source accuracy | sets as accurate "
    print(columns + "| sets of as low a loss | above the line |\n|---|---|---|---|---|---|---|---|")
    for target in result.targets:
        cells = result.cells[result.cells["target"] == target]
        random = cells[cells["scope"].str.startswith(f"{SETS}-")].groupby("scope")[
            ["accuracy", "loss", "source_accuracy"]
        ].mean()  # fmt: skip
        spread = [f"{random[c].mean():.3f} ({random[c].std():.3f})" for c in random]
        print(f"| {target} | {len(random)} random sets | {' | '.join(spread)} | | | |")
        for row in placed[placed["target"] == target].to_dict("records"):
            values = [f"{row[c]:.3f}" for c in ("accuracy", "loss", "source_accuracy")]
            shares = [
                f"{row[c] * row['sets']:.0f} of {row['sets']}"
                for c in ("as_accurate", "as_low_loss")
            ]
            above = f"{row['above_line']:+.3f}"
            print(f"| | {row['scope']} | {' | '.join((*values, *shares, above))} |")
    print(result.differences("decision", "loss").to_string(index=False, max_rows=8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--hours", type=float, default=None)
    args = parser.parse_args()
    if (args.out / "result.json").exists() and not (args.out / "model").exists():
        show(TransferResult.load(args.out / "result.json"))
        return
    model = args.out / "model"
    if not (model / "config.json").exists():
        make_demo_model(model, distances=DISTANCES, seed=0, steps=1600, say=print)
    settings = demo_settings(model, args.sets)
    show(run_transfer(settings, args.out / "run", print, progress=False, hours=args.hours))


if __name__ == "__main__":
    main()
