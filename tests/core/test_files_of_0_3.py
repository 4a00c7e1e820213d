"""Files that version 0.3.0 wrote: results load with their numbers, run directories resume.

The files were made in `tests/files_0_3` with the model `save_model("tiny")` and relative paths.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.checks import assert_same_bits
from helpers.places import TESTS
from helpers.saved import save_model
from safetensors.torch import load_file
from torch import Tensor

import cdt_lens
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.comparing.comparison import Comparison, PlantedComparison
from cdt_lens.core.artifacts import load_artifact
from cdt_lens.core.errors import InputError
from cdt_lens.core.kept import Kept
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.experiments.compare import compare_run
from cdt_lens.experiments.discovery import ablate, discover, load_baseline
from cdt_lens.experiments.runs import Run, open_run
from cdt_lens.experiments.transfer import run_transfer
from cdt_lens.experiments.transfer_config import read_config
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.models.heads import Head
from cdt_lens.scoring.sweep import score_heads

FILES = TESTS / "files_0_3"
RESULTS: list[tuple[str, Any]] = [
    ("run/baseline.json", Baseline),
    ("loose/baseline-mlps.json", Baseline),
    ("run/scores.json", HeadScores),
    ("run/ablation.json", HeadScores),
    ("compared/scores-cdt_stable.json", HeadScores),
    ("run/circuit.json", Circuit),
    ("run/graph.json", Circuit),
    ("run/faithfulness.json", FaithfulnessCurve),
    ("tuned/adapter.json", Adapter),
    ("transfer/adapters/near/norms-0/adapter.json", Adapter),
    ("loose/lora/adapter.json", Adapter),
    ("compared/comparison.json", Comparison),
    ("planted/comparison.json", PlantedComparison),
    ("transfer/result.json", TransferResult),
]


def raw(name: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON and the tensors of a file, read without the package."""
    path = FILES / name
    document = json.loads(path.read_text("utf-8"))
    tensors = document.get("tensors")
    return document, {} if tensors is None else load_file(path.with_name(tensors["file"]))


# Results -------------------------------------------------------------------------------------------


def without_what_is_new(comparison: dict[str, Any]) -> None:
    """Take away what the JSON of a comparison of version 3 says beside that of version 1."""
    assert comparison.pop("budget") is None and comparison.pop("empty_run") == "heads"
    for method in comparison["methods"]:
        assert method.pop("empty_run") == "heads"
        assert method.pop("exact") is None
        assert method.pop("scored") == (None if method["refused"] else comparison["scored"])
    rankings = [method[by] for method in comparison["methods"] for by in ("signed", "magnitude")]
    for curve in [*filter(None, rankings), *comparison["random"]]:
        del curve["log_area"]


@pytest.mark.parametrize(("name", "kind"), RESULTS, ids=[name for name, _ in RESULTS])
def test_a_result_loads_whole_and_is_saved_as_it_was(name: str, kind: Any, tmp_path: Path):
    """Nothing of the file is lost on the way: the new file holds the same JSON and tensors."""
    result = kind.load(FILES / name)
    again = result.save(tmp_path / "again.json")
    (old, old_tensors), (new, new_tensors) = raw(name), raw(again)
    for document in (old, new):
        del document["sha256"]
        document.pop("tensors", None)
    # Version 2 names the metric of version 1 balanced accuracy, version 3 the empty run.
    if kind is FaithfulnessCurve:
        old["version"] = 3
        assert new.pop("empty_run") == "heads"
    if kind is TransferResult:  # one number is the chance level of the first target
        old["chance"] = {old["targets"][0]: old["chance"]}
    if kind in (Comparison, PlantedComparison):
        old["version"] = 3
        for comparison in new.get("circuits", [new]):
            without_what_is_new(comparison)
    assert new == old and list(new) == list(old)
    assert new_tensors.keys() == old_tensors.keys()
    for key, value in old_tensors.items():
        assert_same_bits(new_tensors[key], value)
    assert kind.load(again) == result


@pytest.mark.parametrize("name", ["run/baseline.json", "loose/baseline-mlps.json"])
def test_numbers_of_a_baseline(name: str):
    body, tensors = raw(name)
    found = Baseline.load(FILES / name)
    assert_same_bits(found.means, tensors["means"])
    assert found.kind == body["kind"] and found.provenance.model_hash
    if "mlp_means" in tensors:
        assert found.mlp_means is not None
        assert_same_bits(found.mlp_means, tensors["mlp_means"])
    else:
        assert found.mlp_means is None


@pytest.mark.parametrize("name", ["run/scores.json", "run/ablation.json"])
def test_numbers_of_scores(name: str):
    body, tensors = raw(name)
    found = HeadScores.load(FILES / name)
    assert_same_bits(found.values, tensors["values"])
    assert_same_bits(found.stderr, tensors["stderr"])
    assert_same_bits(found.per_example, tensors["per_example"])
    assert found.direction == body["direction"] and found.method == body["method"]


def test_numbers_of_a_circuit_and_its_graph():
    body, tensors = raw("run/circuit.json")
    found = Circuit.load(FILES / "run" / "circuit.json")
    assert [str(head) for head in found] == body["heads"] and found.scores is not None
    assert_same_bits(found.scores, tensors["scores"])
    body, _ = raw("run/graph.json")
    graph = Circuit.load(FILES / "run" / "graph.json").graph
    assert graph is not None
    rows = [[e.source, e.target, e.site, e.score, e.in_graph] for e in graph.edges]
    assert rows == body["graph"]["edges"] and rows


def test_numbers_of_a_faithfulness_curve():
    body, tensors = raw("run/faithfulness.json")
    found = FaithfulnessCurve.load(FILES / "run" / "faithfulness.json")
    assert_same_bits(found.faithfulness, tensors["faithfulness"])
    assert_same_bits(found.completeness, tensors["completeness"])
    for name, draws in found.random.items():
        assert_same_bits(draws, tensors[f"random.{name}"])
    assert (found.full, found.empty) == (body["full"], body["empty"])


@pytest.mark.parametrize("folder", ["tuned", "transfer/adapters/near/norms-0", "loose/lora"])
def test_numbers_of_an_adapter(folder: str):
    body, tensors = raw(f"{folder}/adapter.json")
    found = Adapter.load(FILES / folder)
    own = {f"slice/{name}": values for name, (_, values) in found.slices.items()}
    own |= {f"whole/{name}": values for name, values in found.whole.items()}
    assert own.keys() == tensors.keys() and found.scope == body["scope"]
    for name, values in tensors.items():
        assert_same_bits(own[name], values)


def test_numbers_of_comparisons():
    body, _ = raw("compared/comparison.json")
    found = Comparison.load(FILES / "compared" / "comparison.json")
    spearman = {row["method"]: row["spearman"] for row in body["methods"]}
    assert {m.method: m.spearman for m in found.methods} == spearman
    assert found.full == body["full"]
    # 0.3.0 kept no values of the examples, and scored the same ones by every method.
    assert found.budget is None and {m.scored for m in found.methods} == {found.scored}
    for frame in (found.areas(), found.faithfulness(), found.differences()):
        assert len(frame) and frame[["low", "high"]].isna().to_numpy().all()
    assert not found.differences()["real"].any()
    f = body["methods"][0]["signed"]["f"][-3:]  # of 1, 4 and 8 heads, at 20, 50 and 100 %
    area = (f[0] + f[1]) / 2 * math.log(2.5) + (f[1] + f[2]) / 2 * math.log(2)
    assert found["exact"].signed.log_area == pytest.approx(area / math.log(5))
    body, _ = raw("planted/comparison.json")
    planted = PlantedComparison.load(FILES / "planted" / "comparison.json")
    assert list(planted.circuits) == [row["name"] for row in body["circuits"]]
    truth = {row["method"]: row["auroc"] for row in body["circuits"][0]["methods"]}
    assert {m.method: m.auroc for m in next(iter(planted.circuits.values())).methods} == truth


def test_numbers_of_a_transfer_result():
    body, _ = raw("transfer/result.json")
    found = TransferResult.load(FILES / "transfer" / "result.json")
    column = body["cells"]["columns"].index("accuracy")
    assert found.cells["accuracy"].tolist() == [row[column] for row in body["cells"]["rows"]]
    assert found.cells.shape == pd.read_csv(FILES / "transfer" / "cells.csv").shape


def test_numbers_of_checkpoints_and_settings():
    for name, kind in (
        ("loose/sweep.json", "cdt_lens.sweep"), ("loose/checkpoint.json", "cdt_lens.checkpoint"),
        ("run/run.json", "cdt_lens.run"),
    ):  # fmt: skip
        (body, tensors), (plain, plain_tensors) = (
            load_artifact(FILES / name, format=kind, version=1), raw(name),
        )  # fmt: skip
        assert repr(body) == repr(
            {k: v for k, v in plain.items() if k not in ("tensors", "sha256")}
        )
        assert tensors.keys() == plain_tensors.keys()
        for key, value in plain_tensors.items():
            assert_same_bits(tensors[key], value)


# Run directories -----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files beside the model that they were made with, as working directory."""
    place = tmp_path / "copy"
    shutil.copytree(FILES, place)
    save_model(place / "tiny")
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def upgraded(monkeypatch: pytest.MonkeyPatch) -> str:
    """A later version of the package; the reason that is given for what 0.3.0 made."""
    monkeypatch.setattr(cdt_lens, "__version__", "99.0")
    return r"cdt_lens 0.3.0 (this is 99.0)"


def opened(folder: str, said: list[str]) -> Run:
    return open_run(folder, said.append)


@pytest.mark.usefixtures("here")
def test_a_discovery_run_whose_key_lacks_the_configuration_is_made_again(monkeypatch):
    """Even in its own version: 0.3.0 knew a model by its weights alone. The numbers are the same."""
    monkeypatch.setattr(cdt_lens, "__version__", "0.3.0")
    said: list[str] = []
    run = opened("run", said)
    _, scores, _ = discover(run, said.append)
    ablate(run, said.append)
    old = HeadScores.load(FILES / "run" / "scores.json")
    torch.testing.assert_close(scores.values, old.values, rtol=1e-4, atol=1e-6)
    for name in ("baseline", "scores", "ablation"):
        reason = f"{name}.json was made with other settings or data ("
        assert any(reason in line and "model" in line for line in said)


@pytest.mark.usefixtures("here")
def test_a_discovery_run_of_an_earlier_version_is_made_again(upgraded: str):
    said: list[str] = []
    run = opened("run", said)
    circuit, scores, _ = discover(run, said.append)
    ablate(run, said.append)
    for name in ("baseline", "scores", "ablation"):
        (line,) = (line for line in said if f"{name}.json" in line)
        # Another class or processor moves the last bits of the baseline, which is then named too.
        assert line.endswith(f"{upgraded}; making it again")
    old = HeadScores.load(FILES / "run" / "scores.json")
    torch.testing.assert_close(scores.values, old.values, rtol=0, atol=1e-5)
    assert circuit.heads == Circuit.load(FILES / "run" / "circuit.json").heads
    assert scores.provenance.versions["cdt_lens"] == "99.0"


@pytest.mark.usefixtures("upgraded")
def test_an_interrupted_sweep_of_an_earlier_version_starts_over(here: Path):
    (here / "run" / "scores.json").unlink()
    for path in (here / "loose").glob("sweep.json*"):
        name = path.name.replace("sweep", "scores.partial")
        shutil.copy(path, here / "run" / name)
    document, _ = raw("loose/sweep.json")
    assert isinstance(document["key"], str), "0.3.0 kept a hash, without a version"
    said: list[str] = []
    # The checkpoint names its tensors by its own old name.
    text = (here / "run" / "scores.partial.json").read_text("utf-8")
    assert "sweep.json." in text
    shutil.copy(here / "loose" / document["tensors"]["file"], here / "run")
    discover(opened("run", said), said.append)
    assert any("scores.partial.json was made with another version" in line for line in said)
    assert not list((here / "run").glob("*partial.json"))


@pytest.mark.usefixtures("here", "upgraded")
def test_checkpoints_that_a_person_named_are_refused_with_the_reason():
    run = opened("run", [])
    why = r"made with an earlier cdt_lens \(this is 99\.0\); remove it"
    with pytest.raises(InputError, match=rf"sweep\.json: .*{why}"):
        score_heads(run.model, run.scored(), load_baseline(run), checkpoint="loose/sweep.json")
    with pytest.raises(InputError, match=rf"checkpoint\.json: .*{why}"):
        finetune(
            run.model, run.task, heads=[Head(0, 1), Head(1, 0)], learning_rate=1e-3, epochs=1,
            checkpoint="loose/checkpoint.json", progress=False,
        )  # fmt: skip


@pytest.mark.usefixtures("here")
def test_a_comparison_is_made_again_in_a_later_version(monkeypatch):
    said: list[str] = []
    old = Comparison.load("compared/comparison.json")
    few = {"methods": old.names, "held_out": old.held_out, "draws": len(old.random)}
    few |= {"budget": old.budget}
    monkeypatch.setattr(cdt_lens, "__version__", "99.0")
    new = compare_run(opened("compared", said), said.append, **few, progress=False)
    reason = "cdt_lens 0.3.0 (this is 99.0); making it again"
    for name in ("baseline", "circuits", "time-exact", "time-direct", "time-cdt_stable"):
        lines = [line for line in said if f"{name}.json was made with" in line]
        assert lines and lines[0].endswith(reason), name
    assert [m.spearman for m in new.methods] == pytest.approx([m.spearman for m in old.methods])


def test_a_transfer_run_is_made_again_with_the_reasons(here: Path):
    """0.3.0 kept no version with proxies and cells, so that nobody can tell what they are of."""
    said: list[str] = []
    file = Path("transfer.toml")
    with pytest.raises(InputError, match=r"other settings \(discovery\)"):
        run_transfer(read_config(file), "transfer", said.append, progress=False)
    # The defaults of 0.3, as the changelog tells.
    former = '[discovery]\nrules = "stable"\nby = "magnitude"'
    file.write_text(file.read_text().replace("[discovery]", former))
    result = run_transfer(read_config(file), "transfer", said.append, progress=False)
    for name in ("proxy", "before/near", "cells/near/full-0", "cells/near/decision-0"):
        reason = f"transfer/{name}.json was made with an earlier cdt_lens"
        assert any(line.startswith(reason) for line in said), name
    old = TransferResult.load(FILES / "transfer" / "result.json")
    assert result.cells["accuracy"].tolist() == pytest.approx(old.cells["accuracy"].tolist())
    body, _ = raw(here / "transfer" / "cells" / "near" / "full-0.json")
    before, _ = raw("transfer/cells/near/full-0.json")
    # A cell of now holds what was made of every test example, as tensors.
    assert body.keys() == before.keys() | {"tensors"}
    assert (
        Kept(
            here / "transfer" / "proxy.json", "cdt_lens.transfer_proxy", {}
        ).why_not_of_this_version()
        is None
    )
