"""`cdt-lens demo`: the whole transfer experiment on an invented language, offline.

A small transformer is pre-trained on the spot (see `demo_model`) and fine-tuned on sentiment in the
source language. Its circuit is found and adapted to two invented languages, a near and a far one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from cdt_lens.core.artifacts import remove_artifact
from cdt_lens.core.folders import check_run_folder
from cdt_lens.core.kept import Kept, Say
from cdt_lens.core.processes import is_main
from cdt_lens.core.run_lock import locked
from cdt_lens.experiments.demo_model import make_demo_model
from cdt_lens.experiments.transfer import Transfer, run_transfer
from cdt_lens.experiments.transfer_config import TransferConfig, config_of
from cdt_lens.finetuning.transfer_result import TransferResult

NEAR, FAR = "0.3", "0.8"
# By default one seed of the circuit, of everything, and of as many random heads.
_SHORT: dict[str, Any] = {"scopes": ["full", "decision", "random"], "seeds": [0]}
_FULL: dict[str, Any] = {
    "scopes": ["full", "decision", "near-zero", "random", "norms", "lora"], "seeds": [0, 1],
}  # fmt: skip


def demo_config(model: str, seed: int = 0, *, full: bool = False) -> TransferConfig:
    """Return the settings of the demo.

    Args:
        model: Folder of the pre-trained model.
        seed: Seed of the data.
        full: Whether every scope is trained, with two seeds.
    """
    return config_of(
        {
            "model": model,
            "task": {
                "name": "pseudo-sentiment", "source": "source", "targets": [NEAR, FAR],
                "sizes": [1500, 150, 300], "seed": seed,
            },
            "proxy": {"epochs": 8, "batch_size": 32, "learning_rate": 2e-3},
            "discovery": {
                "examples": 192, "exact": 192, "fraction": 0.2, "faithfulness_examples": 24,
            },
            "transfer": {
                **(_FULL if full else _SHORT), "examples": 300, "epochs": 10, "batch_size": 16,
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
    folder: str | Path, say: Say, *, seed: int = 0, full: bool = False, progress: bool = True
) -> TransferResult:
    """Pre-train the model, unless it exists, and run the experiment.

    Args:
        folder: Run directory; an interrupted run resumes there.
        say: Takes one line of progress.
        seed: Seed of the model and the data.
        full: Whether every scope is trained, with two seeds. What a shorter demo in the same
            folder has trained is kept.
        progress: Whether to show progress bars.

    Returns:
        The result of the transfer.

    Raises:
        InputError: The folder holds something else, or another process writes in it.
    """
    folder = Path(folder)
    config = demo_config(str(folder / "model"), seed, full=full)
    check_run_folder(folder, "transfer.json")  # Whatever it holds is then the demo's.
    with locked(folder):
        experiment = Transfer(config, folder, say, progress)
        experiment.settle()
        experiment.save_settings()  # The folder is then the demo's.
        _make_model(folder, seed, say)
        return run_transfer(config, folder, say, progress=progress)


def _make_model(folder: Path, seed: int, say: Say) -> None:
    """Pre-train the model, unless it is there as it was made."""
    model, distances = folder / "model", (float(NEAR), float(FAR))
    made_from = {"distances": distances, "seed": seed}
    kept = Kept(folder / "model.json", "cdt_lens.demo_model", made_from, beside=model)
    if kept.reuse(say) is not None:
        return
    if is_main():
        remove_artifact(kept.path)
        shutil.rmtree(model, ignore_errors=True)
        make_demo_model(model, distances=distances, seed=seed, say=say)
    kept.keep({})
