"""Run directories: what is measured again when the data have changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.places import ROOT
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_csv, write_task
from helpers.tiny_training import QUICK, task
from helpers.wrapped import view

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.artifacts import save_artifact
from cdt_lens.core.errors import InputError
from cdt_lens.experiments import discovery as experiment
from cdt_lens.experiments.inputs import load_for, make_task, with_train
from cdt_lens.experiments.runs import Run, discovered_on, kept_settings, open_run, start_run
from cdt_lens.experiments.settings import Settings
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.models.hugging_face import load_tokenizer
from cdt_lens.tasks.evaluate import evaluate
from cdt_lens.tasks.task import drawn


def small_run(folder: Path) -> tuple[Settings, dict[str, Path]]:
    """The settings of a discovery on a tiny model, and its files by split."""
    save_model(folder / "tiny")
    files = write_task(folder / "data")
    settings = Settings(
        model=str(folder / "tiny"), task="files", files={k: str(v) for k, v in files.items()},
        template=TEMPLATE, verbalizer=VERBALIZER, backend="bridge", examples=6, k=2,
    )  # fmt: skip
    return settings, files


def test_a_report_leaves_out_faithfulness_on_other_examples(tmp_path: Path):
    """The scores, and so their options, are the same: only what was measured on is other."""
    settings, files = small_run(tmp_path)
    told: list[str] = []

    def opened() -> Run:
        return start_run(settings, tmp_path / "run", told.append)

    def shown(run: Run) -> bool:
        told.clear()
        page = experiment.report(run, told.append).read_text("utf-8")
        left_out = any("on other examples and is left out; measure again" in t for t in told)
        assert left_out != ("CPR" in page)
        return not left_out

    run = opened()
    experiment.discover(run, told.append)
    for split in ("valid", "test"):
        (tmp_path / "run" / "faithfulness.json").unlink(missing_ok=True)
        experiment.measure(run, told.append, split=split, examples=6, draws=1)
        assert shown(run)
    write_csv(files["valid"], 12, 77)
    assert shown(opened()), "measured on test"
    write_csv(files["test"], 12, 78)
    run = opened()
    assert not shown(run)
    experiment.measure(run, told.append, split="test", examples=6, draws=1)
    assert shown(run)


def test_a_report_leaves_out_a_graph_of_other_examples(tmp_path: Path):
    settings, files = small_run(tmp_path)
    told: list[str] = []
    stale = "graph.json was computed on other examples and is left out; run trace again"

    def opened() -> Run:
        told.clear()
        run = start_run(settings, tmp_path / "run", told.append)
        experiment.discover(run, told.append)
        return run

    run = opened()
    experiment.trace(run, told.append, examples=3, width=2, fan_in=1)
    experiment.report(run, told.append)
    assert stale not in told
    write_csv(files["train"], 24, 79)
    experiment.report(opened(), told.append)
    assert stale in told


def test_the_task_of_own_files_has_one_name(tmp_path: Path):
    settings, _ = small_run(tmp_path)
    assert replace(settings, task=Settings.task).task == "files"
    start_run(settings, tmp_path / "run", print)
    path = tmp_path / "run" / "run.json"
    old = {**kept_settings(path, "cdt_lens.run"), "task": Settings.task}  # as up to 0.5
    save_artifact(path, {"settings": old}, format="cdt_lens.run", version=1)
    assert open_run(tmp_path / "run", print).settings == settings
    assert start_run(settings, tmp_path / "run", print).settings == settings


def test_training_examples_are_not_drawn_without_a_label(tmp_path: Path):
    settings, _ = small_run(tmp_path)
    found = make_task(settings, load_tokenizer(settings.model))
    assert min(with_train(found, 12, 0).train.counts.values()) > 0
    seeds = [seed for seed in range(30) if 0 in drawn(found.train, 3, seed).counts.values()]
    assert seeds
    for seed in range(30):
        if seed in seeds:
            with pytest.raises(InputError, match=f"none of 3 examples drawn with seed {seed}"):
                with_train(found, 3, seed)
        else:
            assert len(with_train(found, 3, seed).train) == 3


def test_a_noisy_ranking_is_told_with_what_would_help_where_it_is_set(tmp_path: Path):
    """Options on the command line; the file of a transfer has settings instead."""
    settings, _ = small_run(tmp_path)
    told: list[str] = []
    run = start_run(settings, tmp_path / "discovery", told.append)
    experiment.discover(run, told.append)
    scores = HeadScores.load(run.path("scores.json"))
    noise = torch.randn(scores.per_example.shape, generator=torch.Generator().manual_seed(0))
    swept = replace(scores, per_example=noise)
    assert swept.cheap is None
    sampled = replace(swept, cheap=noise, corrections=(torch.zeros_like(noise),))
    for given, advice in (
        (swept, "score more prompts (--examples 24)"),
        (sampled, "score more prompts (--examples 24), or sweep more of them (--exact)"),
        (swept, "score more prompts ([discovery] examples = 24)"),
        (sampled, "score more prompts ([discovery] examples = 24), or sweep more of them "
         "([discovery] exact)"),
    ):  # fmt: skip
        told.clear()
        if "[discovery]" in advice:
            (tmp_path / "transfer.json").touch()
        experiment._tell_noise(run, given, 0.0, told.append)
        assert told[0].startswith("caution: much of the ranking is noise (split-half reliability")
        assert told[0].endswith(f"from 6 prompts); {advice}")
    (tmp_path / "rows").mkdir()  # as in the folder of `adapt`
    experiment._tell_noise(run, sampled, 0.0, told.append)
    assert told[-1].endswith("from 6 prompts); give adapt more minutes in another folder")
    (tmp_path / "rows").rmdir()
    small = replace(run.task, train=run.task.train.balanced(6))
    experiment._tell_noise(replace(run, task=small), swept, 0.0, told.append)
    assert told[-1].endswith("from 6 prompts); every balanced training prompt is swept")


def test_the_discovery_of_a_transfer_of_0_3_is_refused_with_the_way_to_open_it():
    with pytest.raises(InputError, match="no run.json.*give the command that made it .* again"):
        open_run(ROOT / "tests" / "files_0_3" / "transfer" / "discovery", print)


def test_correct_only_leaves_what_the_model_answers_right(tokenizer_folder: str):
    seen, data = view("llama", "bridge", tokenizer_folder, torch.float32), task(train=24)
    settings = Settings(model="tiny", correct_only=True)
    for epochs in (1, 6):
        finetune(seen, data, scope="full", keep=True, **QUICK | {"epochs": epochs})
        answers = evaluate(seen, data.train, data).answers
        right = [
            item for item, is_right in zip(data.train, answers["right"], strict=True) if is_right
        ]
        if {item.label for item in right} == set(data.labels):
            break
    assert 0 < len(right) < len(data.train), "learnt too little or too much to tell"
    kept = discovered_on(settings, seen.tl, data)
    assert kept.train.items == tuple(right) and kept.valid is data.valid
    assert discovered_on(Settings(model="tiny"), seen.tl, data) is data


def test_correct_only_is_refused_where_a_label_is_never_right(tokenizer_folder: str):
    seen, data = view("llama", "bridge", tokenizer_folder, torch.float32), task()
    answers = evaluate(seen, data.train, data).answers
    never = next(label for label in data.labels
                 if not answers["right"][answers["label"] == label].any())  # fmt: skip
    told = (
        f"correct_only: of the 13 examples of tiny/train the model answers none of label '{never}'"
    )
    with pytest.raises(InputError, match=told):
        discovered_on(Settings(model="tiny", correct_only=True), seen.tl, data)


def test_the_device_auto_is_a_device_map_which_only_the_bridge_has(folders):
    settings = Settings(model=str(folders("llama")), device="auto")
    assert type(load_for(settings, lambda line: None)).__name__ == "TransformerBridge"
    with pytest.raises(InputError, match="device_map.*backend='bridge'"):
        load_for(Settings(model="tiny", device="auto", backend="hooked"), lambda line: None)
