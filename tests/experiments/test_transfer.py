"""A transfer experiment on a tiny model: what is measured, what is reused, what goes on."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.locks import held_elsewhere
from helpers.run_trees import contents
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_csv
from transformers import AutoModelForCausalLM

import cdt_lens
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.cli import finetune as commands
from cdt_lens.core.artifacts import load_artifact, save_artifact
from cdt_lens.core.errors import ArtifactError, InputError, NonFiniteError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.experiments import scope_choices, transfer, transfer_cells as cells
from cdt_lens.experiments.discovery import discover, measure
from cdt_lens.experiments.runs import apart, open_run
from cdt_lens.experiments.transfer import run_transfer
from cdt_lens.experiments.transfer_config import RelatedSettings, TransferConfig, config_of
from cdt_lens.finetuning import trainer as training
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.scopes import choose_by_race
from cdt_lens.finetuning.training_signal import choose_heads, training_signal
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.models.heads import all_heads
from cdt_lens.models.loading import load_model
from cdt_lens.tasks.datasets import task_from_files
from cdt_lens.tasks.evaluate import evaluate
from cdt_lens.viz.report.training_sections import transfer_section

SCOPES = ["full", "decision", "near-zero", "norms"]
THIS_VERSION = cdt_lens.__version__


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer")
    save_model(folder / "tiny")
    for number, language in enumerate(("source", "near", "far")):
        (folder / language).mkdir()
        for part, (split, size) in enumerate({"train": 24, "valid": 12, "test": 18}.items()):
            write_csv(folder / language / f"{split}.csv", size, 10 * number + part)
    return folder


def files(place: Path, language: str) -> dict[str, str]:
    return {s: str(place / language / f"{s}.csv") for s in ("train", "valid", "test")}


def settings(place: Path, **changes: Any) -> TransferConfig:
    values: dict[str, Any] = {
        "model": str(place / "tiny"),
        "task": {
            "name": "files", "source": "source", "targets": ["near", "far"],
            "template": TEMPLATE, "verbalizer": VERBALIZER,
            "files": {name: files(place, name) for name in ("source", "near", "far")},
        },
        "proxy": {"epochs": 2, "learning_rate": 3e-3},
        "discovery": {"examples": 9, "k": 2, "faithfulness_examples": 6, "draws": 2},
        "transfer": {"scopes": SCOPES, "epochs": 2, "learning_rate": 1e-2, "examples": 20},
    }  # fmt: skip
    for name, value in changes.items():
        section = values.get(name)
        values[name] = section | value if isinstance(section, dict) else value
    return config_of(values)


FEW: dict[str, Any] = {
    "task": {"targets": ["near"]}, "transfer": {"scopes": ["norms"], "epochs": 1},
    "proxy": {"epochs": 1},
}  # fmt: skip


@pytest.fixture
def own(place: Path, tmp_path: Path) -> Path:
    """A copy of the model and the data, for a test to change."""
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    for language in ("source", "near", "far"):
        shutil.copytree(place / language, tmp_path / language)
    return tmp_path


def stages(config: TransferConfig, folder: Path, say: Callable[[str], None]) -> TransferResult:
    """Run the experiment without the report and the figures, which take most of its time here."""
    return transfer.Transfer(config, folder, say, progress=False).run()


def swap_labels(path: Path) -> None:
    """Correct a file's labels: bad and good change places."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        for row in rows:
            other = {"good": "bad", "bad": "good"}.get(row["label"], row["label"])
            writer.writerow({"text": row["text"], "label": other})


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[TransferResult, Path]:
    out = place / "run"
    return run_transfer(settings(place), out, quiet, progress=False), out


def test_every_cell_and_every_file(finished: tuple[TransferResult, Path]):
    result, out = finished
    assert result.cells[["target", "scope"]].to_numpy().tolist() == [
        [target, scope] for target in ("near", "far") for scope in SCOPES
    ]
    assert result.before["language"].tolist() == ["source", "near", "far"]
    again = TransferResult.load(out / "result.json")
    assert again.cells["accuracy"].tolist() == result.cells["accuracy"].tolist()
    for name in ("cells.csv", "summary.csv", "trade_off.png", "accuracies.png", "report.html"):
        assert (out / name).stat().st_size > 100
    assert not list(out.rglob("*checkpoint*")), "a finished cell leaves no checkpoint"
    # The proxy is an ordinary checkpoint.
    AutoModelForCausalLM.from_pretrained(out / "proxy")


def test_f_of_heads_that_change_nothing_is_no_ratio_of_rounding(
    place: Path, finished: tuple[TransferResult, Path], monkeypatch: pytest.MonkeyPatch
):
    """With heads that write nearly nothing, m(full) and m(empty) differ by rounding alone."""
    experiment = transfer.Transfer(settings(place), finished[1], quiet, progress=False)
    with torch.no_grad():
        for layer in experiment.model.original_model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-8)
    task = experiment.tasks["near"]
    baseline = mean_activations(experiment.model, experiment.source.train, progress=False)
    monkeypatch.setattr(transfer, "load_baseline", lambda run: baseline)
    assert math.isnan(experiment._faithfulness(task))


def test_the_discovery_of_a_transfer_opens_as_a_run(finished: tuple[TransferResult, Path]):
    """`cdt-lens faithfulness`, `trace` and `report` take its directory, with the same numbers."""
    _, out = finished
    run = open_run(out / "discovery", quiet)
    kept = FaithfulnessCurve.load(run.path("faithfulness.json"))
    again = measure(run, quiet, examples=6, draws=2)
    assert torch.equal(again.faithfulness, kept.faithfulness)
    assert again.provenance.task == kept.provenance.task == "files/source/valid"
    assert discover(run, quiet)[0].heads == Circuit.load(run.path("circuit.json")).heads


def test_each_target_has_its_own_level_of_chance(own: Path):
    rows = [["w30 w31", "good"]] * 3 + [["w32", "bad"], ["w33", "fine"]]
    with open(own / "far" / "test.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    few = {**FEW, "task": {"targets": ["near", "far"]}}
    result = stages(settings(own, **few), own / "run", quiet)
    assert result.chance == pytest.approx({"near": 1 / 3, "far": 3 / 5})
    assert transfer_section(result, "s", [result]).facts["Chance (always the commonest label)"] == (
        "near 0.333, far 0.600"
    )


def test_a_cell_is_the_adapter_on_the_proxy(finished: tuple[TransferResult, Path], place: Path):
    """The numbers of the table are what anyone gets from the saved adapter and the test file."""
    result, out = finished
    model = load_model(out / "proxy", backend="bridge")
    words = {"tokenizer": model.tokenizer, "template": TEMPLATE, "verbalizer": VERBALIZER}
    tasks = {n: task_from_files(files(place, n), **words) for n in ("source", "far")}
    adapter = Adapter.load(out / "adapters" / "far" / "decision-0")
    row = result.cells[(result.cells.target == "far") & (result.cells.scope == "decision")].iloc[0]
    with adapter.applied(model):
        found = evaluate(model, tasks["far"].test, tasks["far"])
        source = evaluate(model, tasks["source"].test, tasks["source"])
    assert (row.accuracy, row.macro_f1) == pytest.approx((found.accuracy, found.macro_f1))
    before = evaluate(model, tasks["source"].test, tasks["source"])
    assert row.retention == pytest.approx(source.accuracy / before.accuracy)
    assert result.before.set_index("language").loc["source", "accuracy"] == before.accuracy
    assert row.trained_parameters == adapter.elements
    assert 0 < row.share < 1


def test_nothing_is_done_twice(finished: tuple[TransferResult, Path], place: Path, monkeypatch):
    result, out = finished

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("trained or judged again")

    for module, name in ((cells, "finetune"), (cells, "evaluate"), (transfer, "finetune")):
        monkeypatch.setattr(module, name, refuse)
    again = stages(settings(place), out, quiet)
    assert again.cells.equals(result.cells)
    # What a person changes after an interruption, or where memory is short, changes no number.
    free = {"micro_batch": 4, "eval_batch_size": 8, "checkpoint_every": 2}
    again = stages(settings(place, proxy=free, transfer=free), out, quiet)
    assert again.cells.equals(result.cells)


def test_a_killed_cell_goes_on(place: Path, finished: tuple[TransferResult, Path], monkeypatch):
    """Cut off in the middle of a cell, the experiment ends with the numbers of an uncut one."""
    result, _ = finished
    out = place / "killed"
    real, steps = training.Trainer._step, []

    def cut(self: training.Trainer, index: Any, optimizer: Any, state: Any) -> Any:
        steps.append(self.name)
        if steps[-1] == "files/near decision" and state.epoch == 1:
            raise KeyboardInterrupt
        return real(self, index, optimizer, state)

    monkeypatch.setattr(training.Trainer, "_step", cut)
    with pytest.raises(KeyboardInterrupt):
        stages(settings(place), out, quiet)
    assert list(out.rglob("decision-0.checkpoint.json"))
    monkeypatch.setattr(training.Trainer, "_step", real)
    again = stages(settings(place), out, quiet)
    timing = ["seconds"]
    assert again.cells.drop(columns=timing).equals(result.cells.drop(columns=timing))
    one, two = (
        Adapter.load(run / "adapters" / "near" / "decision-0")
        for run in (out, place / "run")
    )  # fmt: skip
    for name, (index, values) in one.slices.items():
        assert index == two.slices[name][0] and torch.equal(values, two.slices[name][1])


def test_targets_and_seeds_can_be_added_later(place: Path, finished: tuple[TransferResult, Path]):
    result, _ = finished
    out = place / "grown"
    small = {"task": {"targets": ["near"]}, "transfer": {"scopes": ["norms"]}}
    stages(settings(place, **small), out, quiet)
    told: list[str] = []
    grown = {"transfer": {"scopes": ["norms"], "seeds": [0, 1]}}
    more = stages(settings(place, **grown), out, told.append)
    assert len(more.cells) == 4
    kept = result.cells[(result.cells.target == "near") & (result.cells.scope == "norms")]
    assert more.cells["accuracy"].iloc[0] == kept["accuracy"].iloc[0]
    assert "near, norms, seed 0" not in told and "near, norms, seed 1" in told


def test_another_experiment_is_not_written_over(place: Path, finished: tuple[TransferResult, Path]):
    _, out = finished
    with pytest.raises(InputError, match=r"other settings \(proxy\); name another folder"):
        stages(settings(place, proxy={"epochs": 3}), out, quiet)


def test_a_cell_that_diverges_is_told_and_the_rest_goes_on(place: Path, monkeypatch):
    real = cells.finetune

    def diverge(*args: Any, **kwargs: Any) -> Any:
        if kwargs["scope"] == "norms":
            raise NonFiniteError("step 3: the loss is nan")
        return real(*args, **kwargs)

    monkeypatch.setattr(cells, "finetune", diverge)
    few = {"task": {"targets": ["near"]}, "transfer": {"scopes": ["norms", "decision"]}}
    result = run_transfer(settings(place, **few), place / "nan", quiet, progress=False)
    norms, decision = (result.cells[result.cells.scope == s].iloc[0] for s in ("norms", "decision"))
    assert norms.stopped == "diverged: step 3: the loss is nan" and norms.accuracy != norms.accuracy
    assert decision.accuracy == decision.accuracy
    assert (place / "nan" / "report.html").exists()


def test_the_choice_of_scope_uses_validation_data_only(
    finished: tuple[TransferResult, Path], place: Path
):
    result, out = finished
    assert result.auto["rule"].tolist() == ["gap", "race"] * 2
    judged = result.before.set_index("language")["valid_accuracy"]
    for row in result.auto.to_dict("records"):
        own = result.cells[result.cells.target == row["target"]].set_index("scope")["accuracy"]
        compared = ["decision", "near-zero"] if row["rule"] == "gap" else SCOPES
        best = {scope for scope in compared if own[scope] == own[compared].max()}
        assert row["right"] == (row["chosen"] in best)
        assert set(row["better"].split(", ")) == ({"tie"} if len(best) == len(compared) else best)
        if row["rule"] == "gap":
            assert f"target_accuracy {judged[row['target']]:.3f}" in row["inputs"]
        else:
            path = out / "cells" / row["target"] / "decision-0.json"
            first = json.loads(path.read_text())["history"][1]
            assert f"decision_loss {first['target_loss']:.3f}" in row["inputs"]


def test_a_ready_proxy_checkpoint_is_used(place: Path, finished: tuple[TransferResult, Path]):
    result, out = finished
    few = {"task": {"targets": ["near"]}, "transfer": {"scopes": ["norms"]}}
    ready = {"proxy": {"checkpoint": str(out / "proxy")}}
    found = stages(settings(place, **few, **ready), place / "ready", quiet)
    assert not (place / "ready" / "proxy").exists()
    expected = result.cells[(result.cells.target == "near") & (result.cells.scope == "norms")]
    assert found.cells["accuracy"].tolist() == expected["accuracy"].tolist()


def test_files_without_a_language_are_named(place: Path, tmp_path: Path):
    task = {"targets": ["elsewhere"]}
    with pytest.raises(InputError, match=r"expected \[task\.files\.elsewhere\]"):
        stages(settings(place, task=task), tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "proxy").exists(), "told before anything is trained"


def test_a_proxy_of_other_data_is_trained_again(own: Path):
    config, told = settings(own, **FEW), []
    first = stages(config, own / "run", quiet)
    for split in ("train", "valid"):
        swap_labels(own / "source" / f"{split}.csv")
    again = stages(config, own / "run", told.append)
    assert any("proxy.json was made with other settings or data (train, valid)" in t for t in told)
    afresh = stages(config, own / "afresh", quiet)
    assert again.provenance.model_hash == afresh.provenance.model_hash
    assert again.provenance.model_hash != first.provenance.model_hash
    assert again.before.equals(afresh.before) and again.discovery == afresh.discovery
    told.clear()
    stages(config, own / "run", told.append)
    assert f"{own / 'run' / 'proxy'}: using the kept result" in told


def test_another_base_model_of_the_same_name_trains_the_proxy_again(own: Path):
    stages(settings(own, **FEW), own / "run", quiet)
    base = AutoModelForCausalLM.from_pretrained(own / "tiny")
    base.get_input_embeddings().weight.data.mul_(1.1)
    base.save_pretrained(own / "tiny")
    told: list[str] = []
    stages(settings(own, **FEW), own / "run", told.append)
    assert any("made with other settings or data (model); making it again" in t for t in told)


def test_a_proxy_that_does_not_say_what_it_was_trained_on_is_trained_again(own: Path):
    """Runs of early versions left such files."""
    config, told = settings(own, **FEW), []
    first = stages(config, own / "run", quiet)
    path = own / "run" / "proxy.json"
    body, _ = load_artifact(path, format="cdt_lens.transfer_proxy", version=1)
    old = {name: body[name] for name in ("history", "options")}
    save_artifact(path, old, format="cdt_lens.transfer_proxy", version=1)
    (own / "tiny").rename(own / "away")
    with pytest.raises(InputError, match="proxy has to be trained again, but: .*tiny"):
        stages(config, own / "run", quiet)
    (own / "away").rename(own / "tiny")
    again = stages(config, own / "run", told.append)
    assert again.cells.equals(first.cells)
    assert any("proxy.json was made with an earlier cdt_lens" in t for t in told)


HEALED = (
    "proxy/model.safetensors", "proxy/tokenizer.json", "proxy.json", "discovery/baseline.json.*",
    "discovery/scores.json.*", "discovery/faithfulness.json.*", "discovery/scores.json",
    "before/near.json", "cells/near/norms-0.json", "adapters/near/norms-0/adapter.json",
    "adapters/near/norms-0/adapter.json.*",
)  # fmt: skip


def one(folder: Path, name: str) -> Path:
    (path,) = (p for p in folder.glob(name) if not name.endswith(".json.*") or p.suffix != ".json")
    return path


def test_whatever_is_damaged_or_missing_is_made_again_in_every_stage(own: Path):
    """A bit of each file that a run reuses: the resumed run says so, and ends as it was."""
    config, run, said = settings(own, **FEW), own / "run", []
    run_transfer(config, run, quiet, progress=False)
    before = contents(run)
    for harm in ("flip", "delete"):
        for name in HEALED:
            path = one(run, name)
            whole = bytearray(path.read_bytes())
            whole[len(whole) * 2 // 3] ^= 1
            path.unlink() if harm == "delete" else path.write_bytes(whole)
        said.clear()
        run_transfer(config, run, said.append, progress=False)
        assert contents(run) == before
        for part in ("proxy", "discovery/baseline.json", "discovery/scores.json"):
            assert harm == "delete" or any(f"run/{part}" in s and "again" in s for s in said), part
    said.clear()
    one(run, "adapters/near/norms-0/adapter.json.*").unlink()
    run_transfer(config, run, said.append, progress=False)
    assert any("safetensors is missing; making it again" in line for line in said)
    assert contents(run) == before
    said.clear()
    with open(run / "proxy" / "model.safetensors", "r+b") as file:
        file.seek(-5, 2)
        file.write(b"\x7f")
    (own / "tiny").rename(own / "away")
    with pytest.raises(InputError, match="tensors is damaged .*; .*proxy has to be trained again"):
        run_transfer(config, run, quiet, progress=False)
    (run / "transfer.json").write_text("{")
    with pytest.raises(ArtifactError, match="transfer.json: damaged: .* remove") as caught:
        run_transfer(config, run, quiet, progress=False)
    assert "\n" not in str(caught.value)


def test_languages_whose_names_differ_in_their_signs_have_files_of_their_own(own: Path):
    names = ["my lang", "my/lang", "my_lang"]
    task = {"targets": names, "files": {"source": files(own, "source")}}
    task["files"] |= {n: files(own, f) for n, f in zip(names, ("near", "far", "near"), strict=True)}
    config = settings(own, **{**FEW, "task": task})
    result = run_transfer(config, own / "run", quiet, progress=False, log_with="tensorboard")
    assert result.cells["target"].tolist() == names
    assert len(list((own / "run" / "logs" / "cells").glob("*/norms-0/events.out.*"))) == 3
    assert len(list((own / "run").glob("adapters/*/norms-0/adapter.json"))) == 3
    said: list[str] = []
    again = run_transfer(config, own / "run", said.append, progress=False)
    assert again.cells.equals(result.cells) and not any("again" in line for line in said)
    with pytest.raises(InputError, match="'near' differs .* case alone, .*; rename one"):
        settings(own, task={"targets": ["near", "Near"]})


def test_a_second_process_is_refused(own: Path):
    other = held_elsewhere(own / "run")
    try:
        with pytest.raises(InputError, match=f"in use by process {other.pid} "):
            run_transfer(settings(own, **FEW), own / "run", quiet, progress=False)
    finally:
        other.kill()
        other.communicate()


@pytest.fixture
def upgraded(monkeypatch: pytest.MonkeyPatch) -> str:
    """The next version of the package, as a run directory of this one meets it."""
    monkeypatch.setattr(cdt_lens, "__version__", "99.0")
    return f"cdt_lens {THIS_VERSION} (this is 99.0)"


def test_after_an_upgrade_nothing_kept_is_used_again(own: Path, upgraded: str, monkeypatch):
    """Every file with numbers is made again, and the reason of each is given."""
    config, told = settings(own, **FEW), []
    with monkeypatch.context() as before:
        before.setattr(cdt_lens, "__version__", THIS_VERSION)
        stages(config, own / "run", quiet)
    stages(config, own / "run", told.append)
    run = own / "run"
    remade = [
        run / "proxy.json", run / "discovery" / "baseline.json", run / "discovery" / "scores.json",
        run / "before" / "source.json", run / "before" / "near.json",
        run / "cells" / "near" / "norms-0.json",
    ]  # fmt: skip
    for path in remade:
        assert any(str(path) in line and upgraded in line for line in told), path
    curve = FaithfulnessCurve.load(run / "discovery" / "faithfulness.json")
    assert curve.provenance.versions["cdt_lens"] == "99.0"
    told.clear()
    stages(config, own / "run", told.append)
    assert not any("again" in line or "norms, seed 0" in line for line in told)


def test_an_interrupted_cell_of_another_version_starts_over(own: Path, upgraded: str, monkeypatch):
    config = settings(own, **{**FEW, "proxy": {"checkpoint": str(own / "tiny")}})
    real = cells.finetune

    def cut() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as before, pytest.raises(KeyboardInterrupt):
        before.setattr(cdt_lens, "__version__", THIS_VERSION)
        before.setattr(cells, "finetune", lambda *a, **k: real(*a, **{**k, "judge": cut}))
        stages(config, own / "run", quiet)
    told: list[str] = []
    stages(config, own / "run", told.append)
    assert any(f"norms-0.checkpoint.json was made with {upgraded}; removed" in t for t in told)


def test_an_interrupted_cell_resumes_whatever_its_scope_makes_of_the_options(
    own: Path, monkeypatch
):
    """The scope `norms` always trains all norms, so its checkpoint has other options than asked."""
    few = {**FEW, "transfer": {"scopes": ["norms"], "epochs": 1, "norms": "circuit"}}
    config = settings(own, **{**few, "proxy": {"checkpoint": str(own / "tiny")}})
    real = cells.finetune

    def cut() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cells, "finetune", lambda *a, **k: real(*a, **{**k, "judge": cut}))
        stages(config, own / "run", quiet)
    told: list[str] = []
    stages(config, own / "run", told.append)
    assert not any("removed" in t for t in told)


def test_a_finished_run_needs_its_base_model_only_to_train(own: Path):
    config, told = settings(own, **FEW), []
    first = stages(config, own / "run", quiet)
    shutil.rmtree(own / "tiny")
    assert stages(config, own / "run", told.append).cells.equals(first.cells)
    assert any("proxy is not compared with it" in t for t in told)
    swap_labels(own / "source" / "train.csv")
    with pytest.raises(InputError, match="tiny"):
        stages(config, own / "run", quiet)
    assert (own / "run" / "proxy").exists()


def test_an_interrupted_proxy_stage_starts_over_with_other_data(own: Path, monkeypatch):
    def cut(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "export", cut)
    with pytest.raises(KeyboardInterrupt):
        stages(settings(own, **FEW), own / "run", quiet)
    monkeypatch.undo()
    swap_labels(own / "source" / "train.csv")
    told: list[str] = []
    stages(settings(own, **FEW), own / "run", told.append)
    assert any("proxy.checkpoint.json was made with other settings or data" in t for t in told)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_faithfulness_is_measured_again_on_other_data(own: Path, split: str):
    """On the target too: circuit and means come from the source."""
    config = settings(own, **{**FEW, "proxy": {"checkpoint": str(own / "tiny")}})
    first = stages(config, own / "run", quiet)
    write_csv(own / "source" / f"{split}.csv", 24, 77)
    again = stages(config, own / "run", quiet)
    afresh = stages(config, own / "afresh", quiet)
    assert again.discovery == afresh.discovery
    assert again.discovery["CPR"] != first.discovery["CPR"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("ready", [True, False])
def test_prompts_past_the_context_are_refused_before_anything_is_trained(
    own: Path, family: str, ready: bool
):
    """Of the split, too, that is read last."""
    model = save_model(own / family, family)
    with open(own / "near" / "test.csv", "a", encoding="utf-8") as file:
        file.write(" ".join(["w30"] * 100) + ",good\n")
    told: list[str] = []
    proxy = {"checkpoint": str(model)} if ready else {"epochs": 1}
    config = settings(own, **{**FEW, "model": str(model), "proxy": proxy})
    words = "^files/near/test, example 19: prompt of 102 tokens: .* reads at most 64. Shorten"
    with pytest.raises(InputError, match=words):
        stages(config, own / "run", told.append)
    assert not told and not (own / "run" / "proxy").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"discovery": {"faithfulness_examples": 1}}, "cannot draw 1 examples balanced over 3"),
        ({"discovery": {"examples": 1}}, "cannot draw 1 examples balanced over 3"),
        ({"discovery": {"apart": 1}}, "no example has the label"),
        ({"transfer": {"examples": 1}}, "none of 1 examples drawn with seed 0 has the label"),
    ],
)
def test_too_few_examples_of_a_later_stage_are_refused_before_anything_is_trained(
    own: Path, changes: dict[str, Any], words: str
):
    told: list[str] = []
    both = {name: FEW.get(name, {}) | changes.get(name, {}) for name in {*FEW, *changes}}
    with pytest.raises(InputError, match=words):
        stages(settings(own, **both), own / "run", told.append)
    assert not told and not (own / "run" / "proxy").exists()


def test_an_interrupted_cell_starts_over_with_other_settings_and_else_goes_on(
    own: Path, monkeypatch
):
    def interrupted(out: Path) -> TransferConfig:
        config = settings(own, **{**FEW, "proxy": {"checkpoint": str(own / "tiny")}})
        real = cells.finetune

        def cut() -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(cells, "finetune", lambda *a, **k: real(*a, **{**k, "judge": cut}))
            stages(config, out, quiet)
        return config

    told: list[str] = []
    stages(interrupted(own / "same"), own / "same", told.append)
    assert not any("removed" in t for t in told)
    config = interrupted(own / "other")
    fewer = dataclasses.replace(config.transfer, examples=12)
    config = dataclasses.replace(config, transfer=fewer)
    result = stages(config, own / "other", told.append)
    assert any("norms-0.checkpoint.json was made with other settings" in t for t in told)
    assert any("(task); removed" in t for t in told)
    afresh = stages(config, own / "afresh", quiet)
    assert result.cells.drop(columns="seconds").equals(afresh.cells.drop(columns="seconds"))


def test_a_mean_over_fewer_seeds_than_asked_says_so(own: Path, monkeypatch, capsys):
    real = cells.finetune

    def diverge(*args: Any, **kwargs: Any) -> Any:
        if kwargs["options"].seed == 1:
            raise NonFiniteError("step 3: the loss is nan")
        return real(*args, **kwargs)

    monkeypatch.setattr(cells, "finetune", diverge)
    few = {**FEW, "transfer": {"scopes": ["norms"], "seeds": [0, 1], "epochs": 1}}
    result = stages(settings(own, **few), own / "run", quiet)
    commands.show_transfer(result)
    printed = capsys.readouterr().out
    assert "means over fewer seeds than asked: near norms 1 of 2 seeds, 1 diverged" in printed
    section = transfer_section(result, "s", [result])
    assert section.facts["Runs finished"] == "1 of 2; 1 diverged"
    assert section.headline[1].endswith("one target, 1 of 2 seeds")


def test_a_scope_of_which_every_run_diverged_has_no_numbers(own: Path, monkeypatch, capsys):
    def diverge(*_: Any, **__: Any) -> Any:
        raise NonFiniteError("step 3: the loss is nan")

    monkeypatch.setattr(cells, "finetune", diverge)
    commands.show_transfer(stages(settings(own, **FEW), own / "run", quiet))
    printed = capsys.readouterr().out
    assert "near norms 0 of 1 seeds, 1 diverged" in printed
    rows = [line.split() for line in printed.splitlines()]
    found = [word for row in rows if row[:2] == ["near", "norms"] for word in row[2:]]
    assert found == ["0", "of", "1", *5 * ["n/a"]]


VARIANTS: dict[str, Any] = {
    "three": {"scope": "decision", "k": 3, "epochs": 1},
    "by-gradient": {"scope": "decision", "heads": "gradient"},
    "by-both": {"scope": "decision", "heads": "both"},
    "drawn": {"scope": "random", "sets": 2},
    "low-rank": {"scope": "lora", "lora_modules": "all", "match": "three"},
    "attention": {"scope": "lora", "lora_rank": 8},
    "everywhere": {"scope": "lora", "lora_modules": "all", "match": "attention"},
}


@pytest.fixture(scope="module")
def varied(place: Path) -> tuple[TransferResult, Path]:
    changes = {"scopes": ["decision", "norms"], "variants": VARIANTS, "seeds": [0, 1]}
    config = settings(place, task={"targets": ["near"]}, transfer=changes)
    return stages(config, place / "varied", quiet), place / "varied"


def test_variants_train_other_heads_with_other_options(varied: tuple[TransferResult, Path]):
    result, _ = varied
    names = (
        "decision",
        "norms",
        "three",
        "by-gradient",
        "by-both",
        "drawn-1",
        "drawn-2",
        "low-rank",
        "attention",
        "everywhere",
    )
    assert result.scopes == names
    cells = result.cells.set_index(["scope", "seed"])
    assert cells.loc["three", "heads"].tolist() == [3, 3]
    assert cells.loc["by-gradient", "heads"].tolist() == [2, 2]
    assert set(cells.loc["drawn-1", "trains"]) == {"random"}
    assert max(cells.loc["three", "best_epoch"]) <= 1
    # Rank of LoRA: that with the nearest number of parameters; a rank is 4 widths a layer.
    wanted, found = (
        cells.loc[name, "trained_parameters"].iloc[0] for name in ("three", "low-rank")
    )
    assert abs(found - wanted) <= found / 2
    wanted, found = (
        cells.loc[name, "trained_parameters"].iloc[0] for name in ("attention", "everywhere")
    )
    assert abs(found - wanted) <= found / 4


def test_runs_that_match_each_other_are_refused(place: Path):
    own = {"scope": "lora", "lora_modules": "all"}
    both = {"one": own | {"match": "other"}, "other": own | {"match": "one"}}
    with pytest.raises(InputError, match="one: match='other' matches another run itself"):
        settings(place, transfer={"scopes": ["decision"], "variants": both})


def test_a_random_set_is_the_same_with_every_seed(varied: tuple[TransferResult, Path]):
    _, out = varied
    heads = {
        (name, seed): Adapter.load(out / "adapters" / "near" / f"{name}-{seed}").heads
        for name in ("drawn-1", "drawn-2")
        for seed in (0, 1)
    }
    assert heads["drawn-1", 0] == heads["drawn-1", 1] != heads["drawn-2", 0]
    assert Adapter.load(out / "adapters" / "near" / "drawn-1-0").scope == "random"


def test_differences_are_those_of_the_test_examples(varied: tuple[TransferResult, Path]):
    result, _ = varied
    again = result.differences("decision").set_index("other")
    means = result.cells.groupby("scope")[["accuracy", "source_accuracy", "loss"]].mean()
    for name, column in (
        ("right", "accuracy"),
        ("source_right", "source_accuracy"),
        ("loss", "loss"),
    ):
        found = result.differences("decision", name).set_index("other")["difference"]
        for other in ("norms", "three", "drawn-2"):
            expected = means.loc["decision", column] - means.loc[other, column]
            assert found[other] == pytest.approx(expected, abs=1e-6)
    assert (again["low"] <= again["difference"]).all() and (again["seeds"] == 2).all()
    with pytest.raises(InputError, match="expected one of decision, norms"):
        result.differences("other")


def test_text_and_related_task_are_measured(place: Path):
    related = {
        "name": "files", "files": files(place, "far"), "template": TEMPLATE,
        "verbalizer": VERBALIZER, "examples": 12,
    }  # fmt: skip
    config = settings(place, **FEW)
    config = dataclasses.replace(
        config, related=config_of({**config.to_dict(), "related": related}).related
    )
    result = stages(config, place / "related", quiet)
    row, before = result.cells.iloc[0], result.before.set_index("language")
    for name in ("source_text_loss", "target_text_loss", "related_accuracy", "related_retention"):
        assert math.isfinite(row[name]), name
    assert before["text_loss"].notna().all()
    # Other examples of the same related task are another measurement.
    more = dataclasses.replace(config, related=dataclasses.replace(config.related, examples=60))
    again = stages(more, place / "related", quiet)
    fresh = stages(more, place / "related anew", quiet)
    for name in ("related_accuracy", "related_retention"):
        assert again.cells[name].tolist() == fresh.cells[name].tolist()


def test_the_search_takes_the_best_rate_on_validation_data(place: Path, monkeypatch):
    said: list[str] = []
    changes = {"scopes": ["decision", "norms"], "search": [1e-6, 1.0]}
    config = settings(place, task={"targets": ["near"]}, transfer=changes)
    monkeypatch.setattr(cells.Cells, "_judge", lambda *_: pytest.fail("test data were read"))
    run = transfer.Transfer(config, place / "searched", said.append, progress=False)
    run.settle()
    run._train_proxy()
    run._discover()
    assert run.cells.search(lambda: False)
    for name in ("decision", "norms"):
        histories = {
            factor: load_artifact(
                place / "searched" / "search" / f"{name}-{factor:g}.json",
                format="cdt_lens.transfer_tried", version=1,
            )[0]["history"]
            for factor in (1e-6, 1.0)
        }  # fmt: skip
        best = {f: max((r["target_accuracy"], -r["target_loss"]) for r in rows if r["epoch"])
                for f, rows in histories.items()}  # fmt: skip
        assert run.cells._factors[name] == max(best, key=lambda factor: best[factor])
        # The checkpoint of the best trial alone is left.
        checkpoints = [p.name for p in run.folder.glob(f"search/{name}-*.checkpoint.json")]
        assert checkpoints == [f"{name}-{run.cells._factors[name]:g}.checkpoint.json"]
    monkeypatch.undo()
    cell = run.cells.cell("near", "norms", 0)
    assert cell["row"]["learning_rate"] == pytest.approx(1e-2 * run.cells._factors["norms"])
    # The measured seconds are those of the trial, so it was not trained again.
    factor = run.cells._factors["norms"]
    trial = run.cells.trial("norms", factor).history(quiet)
    assert trial and [row["seconds"] for row in cell["history"]] == [r["seconds"] for r in trial]
    assert not list(run.folder.glob("search/norms-*.checkpoint*"))
    assert (run.folder / "search" / f"norms-{factor:g}.log.jsonl").exists()


def test_a_run_stops_at_the_end_of_a_cell_and_goes_on(place: Path):
    said: list[str] = []
    config = settings(place, task={"targets": ["near"]}, transfer={"scopes": ["decision", "norms"]})
    out, asked = place / "in sittings", iter([False, True])
    first = transfer.Transfer(config, out, said.append, False, lambda: next(asked)).run()
    assert first.cells["scope"].tolist() == ["decision"]
    assert "the time is over: 1 cells are left; the same command goes on with them" in said
    kept = TransferResult.load(out / "result.json").cells  # written as the cell ended
    assert kept["accuracy"].tolist() == first.cells["accuracy"].tolist()
    assert stages(config, out, quiet).cells["scope"].tolist() == ["decision", "norms"]


def test_the_table_holds_every_finished_cell_when_a_later_scope_is_cut_off(place: Path):
    out = place / "scope added"

    def with_scopes(*scopes: str) -> TransferConfig:
        transfer = {"scopes": scopes, "epochs": 1, "seeds": [0, 1]}
        return settings(place, task={"targets": ["near"]}, transfer=transfer)

    def cut(line: str) -> None:
        if line == "near, decision, seed 1":
            raise KeyboardInterrupt

    stages(with_scopes("norms"), out, quiet)
    with pytest.raises(KeyboardInterrupt):
        stages(with_scopes("decision", "norms"), out, cut)
    table = TransferResult.load(out / "result.json").cells
    kept = table[["scope", "seed"]].to_numpy().tolist()
    assert kept == [["decision", 0], ["norms", 0], ["norms", 1]]


def test_a_search_that_is_cut_off_hides_no_finished_cell(place: Path):
    out = place / "search added to"

    def config(*scopes: str, **changes: object) -> TransferConfig:
        values = {"scopes": scopes, "epochs": 1, "search": [0.5]} | changes
        return settings(place, task={"targets": ["near"]}, transfer=values)

    first = stages(config("norms"), out, quiet)
    assert first.cells["learning_rate"].tolist() == [0.5 * 1e-2]
    (out / "cells" / "near" / "other.checkpoint.json").write_text("{}", "utf-8")
    said: list[str] = []

    def sitting(config: TransferConfig) -> TransferResult:
        return transfer.Transfer(config, out, said.append, False, lambda: True).run()

    assert sitting(config("decision", "norms")).cells.equals(first.cells)
    assert TransferResult.load(out / "result.json").cells.equals(first.cells)
    assert "the time is over: 1 cells are left; the same command goes on with them" in said
    rules = json.loads((out / "auto-rules.json").read_text("utf-8"))["rules"]
    assert [rule["finished_cells"] for rule in rules] == [0, 1]
    # With another search the rate is not known yet, so that no cell is that of the run.
    assert sitting(config("norms", search=[1, 2])).cells.empty


def test_a_cell_that_does_not_fit_into_memory_is_left_out_for_now(place: Path, monkeypatch):
    """The allocator is that of the machine, so the test raises its error."""
    true = cells.finetune

    def small(*args: Any, **options: Any) -> Any:
        if options["scope"] == "decision":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return true(*args, **options)

    changes = {"scopes": ["decision", "norms"], "epochs": 1}
    config = settings(place, task={"targets": ["near"]}, transfer=changes)
    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(cells, "finetune", small)
        first = stages(config, place / "small memory", said.append)
    assert first.cells["scope"].tolist() == ["norms"]
    assert [line for line in said if "the memory is too small for it; micro_batch = 8" in line]
    again = stages(config, place / "small memory", quiet)
    assert again.cells["scope"].tolist() == ["decision", "norms"]


def test_heads_by_gradient_are_chosen_by_what_is_trained(
    finished: tuple[TransferResult, Path], place: Path
):
    """Key and value slices that are left out of the training are left out of the choice."""
    chosen = {}
    for kv in ("shared", "skip"):
        variant = {"scope": "decision", "heads": "gradient", "kv": kv, "k": 6}
        changes = {"scopes": ["norms"], "variants": {"by-gradient": variant}}
        run = transfer.Transfer(settings(place, transfer=changes), finished[1], quiet, False)
        plan = run.cells._plan("near", "by-gradient", 0)
        signal = training_signal(run.model, plan.task.train, kv=kv)
        scores = HeadScores.load(finished[1] / "discovery" / "scores.json")
        assert plan.heads == choose_heads(scores, 6, "signed", "gradient", signal).heads
        chosen[kv] = plan.heads
    assert chosen["shared"] != chosen["skip"]


def test_the_protocol_of_the_paper(place: Path):
    values = settings(place).to_dict()
    values = {name: values[name] for name in ("model", "task")} | {"protocol": "paper"}
    values["discovery"] = {
        "apart": 12,
        "k": 2,
        "examples": 6,
        "exact": 6,
        "faithfulness_examples": 6,
    }
    read = config_of(values | {"transfer": {"seeds": [0], "scopes": ["decision"]}})
    assert (read.proxy.training.epochs, read.transfer.training.learning_rate) == (5, 5e-5)
    assert config_of(read.to_dict()) == read
    run = transfer.Transfer(read, place / "paper", quiet, progress=False)
    run.settle()
    run._train_proxy()
    whole, kept = run.source.train, run._without_apart(run.source).train
    pool = apart(read.settings("source"), run.source).train
    assert len(pool) == 12 and len(kept) == len(whole) - 12
    assert not set(map(id, pool)) & set(map(id, kept))


def test_the_report_holds_the_differences(varied: tuple[TransferResult, Path]):
    result, _ = varied
    section = transfer_section(result, "x", [])
    captions = [table.caption for table in section.tables]
    assert captions[1] == (
        "decision minus each other scope, on the same test examples: mean and 95 % interval over "
        "test examples and seeds"
    )
    found = result.differences("decision").iloc[0]
    assert section.tables[1].rows[0][:2] == ["near", "norms"]
    assert str(section.tables[1].rows[0][2]).startswith(f"{found['difference']:+.3f} [")


def test_the_rules_are_written_down_before_a_test_split_is_read(
    finished: tuple[TransferResult, Path],
):
    _, out = finished
    (entry,) = load_artifact(out / "auto-rules.json", format="cdt_lens.auto_rules", version=1)[0][
        "rules"
    ]
    assert entry["finished_cells"] == 0 and len(entry["sha256"]) == 64
    assert entry["rule"]["race"]["scopes"] == ["norms", "near-zero", "decision", "full"]
    first = min(path.stat().st_mtime for path in (out / "cells").glob("*/*.json"))
    assert (out / "auto-rules.json").stat().st_mtime <= first


def test_a_mistake_can_be_mended_in_the_same_folder(place: Path, tmp_path: Path, monkeypatch):
    """What was refused has left no settings that would refuse the right ones."""
    wrong: dict[str, dict[str, Any]] = {
        "txt": {"task": {"template": "{txt} w3"}},
        r"\[discovery\]: k=99: the model has 8 heads": {"discovery": {"k": 99}},
        r"\[discovery\]: apart=24: .* has 24 examples": {"discovery": {"apart": 24}},
    }
    for said, changes in wrong.items():
        with pytest.raises(InputError, match=said):
            run_transfer(settings(place, **changes), tmp_path / "run", quiet, progress=False)
    related = RelatedSettings(
        name="files", files={"train": files(place, "far")["train"]}, template=TEMPLATE,
        verbalizer=VERBALIZER,
    )  # fmt: skip
    untested = dataclasses.replace(settings(place), related=related)
    with pytest.raises(InputError, match="test"):
        run_transfer(untested, tmp_path / "run", quiet, progress=False)
    monkeypatch.setattr(transfer.Transfer, "_make_proxy", lambda *_: pytest.fail("it went on"))
    with pytest.raises(pytest.fail.Exception, match="it went on"):
        run_transfer(settings(place), tmp_path / "run", quiet, progress=False)


def test_a_source_that_nothing_is_right_in_loses_nothing():
    """Its retention is no number."""
    rows = {
        scope: {"target_accuracy": a, "target_loss": 1.0, "source_accuracy": 0.0}
        for scope, a in (("norms", 0.5), ("full", 0.6))
    }
    choice = choose_by_race(rows, least_retention=0.9, source_before=0.0)
    cells = {
        scope: {"row": {"accuracy": row["target_accuracy"], "retention": math.nan}}
        for scope, row in rows.items()
    }
    judged = scope_choices._judged(choice, cells, 0.9)
    assert (judged["chosen"], judged["better"], judged["right"]) == ("full", "full", True)


def test_the_heads_of_a_cell_are_those_that_are_trained(place: Path):
    """Query heads of a group that shares a key and a value are trained together."""
    changes = {"scopes": ["decision"], "epochs": 1, "kv": "groups"}
    config = settings(place, task={"targets": ["near"]}, discovery={"k": 1}, transfer=changes)
    result = stages(config, place / "groups", quiet)
    adapter = Adapter.load(place / "groups" / "adapters" / "near" / "decision-0")
    assert result.cells["heads"].tolist() == [len(adapter.heads)] and len(adapter.heads) > 1


def test_what_a_person_adds_is_theirs_and_what_a_kill_left_is_removed(
    finished: tuple[TransferResult, Path], place: Path, tmp_path: Path
):
    """Nothing is made again, also with other sizes of a pass."""
    out = tmp_path / "run"
    shutil.copytree(finished[1], out)
    added = [out / "proxy" / "notes.txt", out / "adapters" / "near" / "decision-0" / "notes.txt"]
    for path in added:
        path.write_text("mine", "utf-8")
    left = out / "cells" / "near" / "full-0.checkpoint.json"
    left.write_text("{}", "utf-8")
    said: list[str] = []
    config = settings(place, discovery={"rows": 40, "batch_size": 5})
    result = stages(config, out, said.append)
    assert result.cells.equals(finished[0].cells)
    assert not [line for line in said if "again" in line]
    assert [path.read_text("utf-8") for path in added] == ["mine", "mine"] and not left.exists()


def test_the_opened_discovery_has_the_examples_that_were_set_aside(place: Path):
    config = settings(place, discovery={"apart": 12, "examples": 6}, **FEW)
    run = transfer.Transfer(config, place / "set aside", quiet, progress=False)
    run.prepare()
    run._discover()
    opened = open_run(place / "set aside", quiet)
    assert len(opened.task.train) == 12
    assert opened.scored().hash == run.discovery.scored().hash
    assert not {e.prompt for e in opened.scored()} & {
        e.prompt for e in run._without_apart(run.source).train
    }


def test_a_matched_rank_is_that_of_its_target(
    finished: tuple[TransferResult, Path], place: Path, monkeypatch
):
    """Heads by gradient are other heads on every target, with other numbers of parameters."""
    variants = {
        "own": {"scope": "decision", "heads": "gradient"},
        "low-rank": {"scope": "lora", "match": "own"},
    }
    changes = {"scopes": ["norms"], "variants": variants}
    run = transfer.Transfer(settings(place, transfer=changes), finished[1], quiet, False)
    few = {"near": 1, "far": 6}

    def heads(_: Any, variant: Any, target: str, *__: Any) -> tuple[Any, ...]:
        everyone = all_heads(run.cells.scores.n_layers, run.cells.scores.n_heads)
        return everyone[: few[target]] if variant.scope == "decision" else ()

    monkeypatch.setattr(cells.Cells, "_heads", heads)
    ranks = {t: run.cells._plan(t, "low-rank", 0).options.lora_rank for t in ("near", "far")}
    assert ranks["near"] < ranks["far"]


def test_the_rules_are_fixed_before_the_untouched_proxy_is_judged(
    finished: tuple[TransferResult, Path], place: Path, tmp_path: Path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(finished[1], out)
    (out / "auto-rules.json").unlink()

    def before(*_: Any) -> None:
        assert (out / "auto-rules.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(cells.Cells, "before", before)
    with pytest.raises(KeyboardInterrupt):
        stages(settings(place), out, quiet)
