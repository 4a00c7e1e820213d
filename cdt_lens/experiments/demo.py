"""`cdt-lens demo`: the whole transfer experiment on an invented language, offline.

A small transformer is pre-trained on the spot (see `demo_model`) and fine-tuned on sentiment in the
source language. Its circuit is found and adapted to two invented languages, a near and a far one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cdt_lens.core.processes import is_main, wait_for_all
from cdt_lens.experiments.demo_model import make_demo_model
from cdt_lens.experiments.transfer import Transfer, run_transfer
from cdt_lens.experiments.transfer_config import TransferConfig, config_of
from cdt_lens.finetuning.transfer_result import TransferResult

NEAR, FAR = "0.3", "0.8"


def demo_config(model: str, seed: int = 0) -> TransferConfig:
    """Return the settings of the demo.

    Args:
        model: Folder of the pre-trained model.
        seed: Seed of the data.
    """
    return config_of(
        {
            "model": model,
            "task": {
                "name": "pseudo-sentiment", "source": "source", "targets": [NEAR, FAR],
                "sizes": [1500, 150, 300], "seed": seed,
            },
            "proxy": {"epochs": 8, "batch_size": 32, "learning_rate": 2e-3},
            "discovery": {"examples": 48, "fraction": 0.2, "faithfulness_examples": 24},
            "transfer": {
                "scopes": ["full", "decision", "near-zero", "random", "norms", "lora"],
                "seeds": [0, 1], "examples": 300, "epochs": 10, "batch_size": 16,
                "evaluate_every": 2,
                "learning_rates": {
                    "full": 1e-3, "decision": 3e-3, "near-zero": 3e-3, "random": 3e-3,
                    "norms": 1e-2, "lora": 3e-3,
                },
            },
        },
        where="demo",
    )  # fmt: skip


def run_demo(
    folder: str | Path, say: Callable[[str], None], *, seed: int = 0, progress: bool = True
) -> TransferResult:
    """Pre-train the model, unless it exists, and run the experiment.

    Args:
        folder: Run directory; an interrupted run resumes there.
        say: Takes one line of progress.
        seed: Seed of the model and the data.
        progress: Whether to show progress bars.

    Returns:
        The result of the transfer.

    Raises:
        InputError: The folder is a file, or holds other files or another experiment.
    """
    folder = Path(folder)
    model = folder / "model"
    config = demo_config(str(model), seed)
    Transfer(config, folder, say, progress).settle()
    if not model.exists() and is_main():
        distances = (float(NEAR), float(FAR))
        make_demo_model(model, distances=distances, seed=seed, say=say)
    wait_for_all()
    return run_transfer(config, folder, say, progress=progress)
