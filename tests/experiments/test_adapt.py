"""`adapt`: rows are divided and checked, the search is judged on validation rows, the model is exported."""

from __future__ import annotations

import csv
import inspect
import json
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_csv
from scipy.stats import t
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cdt_lens.core.artifacts import save_artifact
from cdt_lens.core.errors import CdtLensWarning, InputError
from cdt_lens.experiments import adapt as adapting, transfer_cells as cells
from cdt_lens.experiments.adapt import run_adapt
from cdt_lens.experiments.adapt_settings import AdaptSettings
from cdt_lens.experiments.runs import kept_settings
from cdt_lens.experiments.transfer import RUN_FORMAT
from cdt_lens.finetuning.adapt_result import AdaptResult
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.trainer import Trainer
from cdt_lens.models.loading import load_model
from cdt_lens.tasks.task import Task
from cdt_lens.viz.report.report import render_report

EPOCHS: list[str] = []  # of every training of the fixture `adapted`


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt")
    save_model(folder / "tiny")
    write_csv(folder / "source.csv", 60, 0)
    write_csv(folder / "target.csv", 60, 1)
    return folder


def settings(place: Path, **changes: Any) -> AdaptSettings:
    values: dict[str, Any] = {
        "model": str(place / "tiny"), "template": TEMPLATE, "verbalizer": VERBALIZER,
        "source": {"train": str(place / "source.csv")},
        "target": {"train": str(place / "target.csv")}, "epochs": 1, "keep": 0.5,
    }  # fmt: skip
    return AdaptSettings(**values | changes)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def adapted(place: Path) -> tuple[AdaptResult, Path]:
    out = place / "run"
    whole = Trainer._epoch

    def counted(trainer: Trainer, *args: Any) -> None:
        EPOCHS.append(trainer.name)
        whole(trainer, *args)

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_epoch", counted)
        patch.setattr(adapting, "_FACTORS", ())  # other rates
        warnings.simplefilter("ignore", CdtLensWarning)
        result = run_adapt(settings(place), out, quiet, progress=False, log_with="tensorboard")
        return result, out


def write_words(place: Path) -> None:
    """Write files of two languages in which each label has a word of its own."""
    draw = random.Random(0)
    for language, first in (("source", 20), ("target", 50)):
        with open(place / f"{language}.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for i in range(90):
                words = [draw.randrange(110, 120) for _ in range(draw.randrange(1, 4))]
                words.append(first + 10 * (i % 3))
                rows.writerow([" ".join(f"w{n}" for n in words), list(VERBALIZER)[i % 3]])


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdaptResult, Path]:
    place = tmp_path_factory.mktemp("learnt")
    save_model(place / "tiny")
    write_words(place)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapting, "_FACTORS", ())
        patch.setattr(adapting, "_ORDER", ("lora",))
        warnings.simplefilter("ignore", CdtLensWarning)
        result = run_adapt(settings(place, epochs=4), place / "run", quiet, progress=False)
    assert result.exported == "model" and not result.nothing_learnt
    return result, place / "run"


def test_the_rows_are_divided_within_labels(adapted: tuple[AdaptResult, Path], place: Path):
    _, out = adapted
    for language in ("source", "target"):
        splits = {
            s: rows_of(out / "rows" / language / f"{s}.csv") for s in ("train", "valid", "test")
        }
        assert {s: len(rows) for s, rows in splits.items()} == {
            "train": 36,
            "valid": 12,
            "test": 12,
        }
        together = [row["text"] for rows in splits.values() for row in rows]
        assert sorted(together) == sorted(row["text"] for row in rows_of(place / f"{language}.csv"))
        for rows in splits.values():
            assert len({[row["label"] for row in rows].count(label) for label in VERBALIZER}) == 1


def test_every_training_is_in_the_logs(adapted: tuple[AdaptResult, Path]):
    result, out = adapted
    logs = {str(p.parent.relative_to(out / "logs")) for p in out.glob("logs/**/events.out.*")}
    runs = {f"search/{run}-1" for run in result.trials["run"]}
    assert runs | {"proxy"} <= logs
    reader = EventAccumulator(str(out / "logs" / "search" / f"{result.chosen}-1")).Reload()
    found = [event.value for event in reader.Scalars("validation/target_accuracy")]
    trial = result.trials.set_index("run").loc[result.chosen]
    assert max(found) == pytest.approx(trial["target_accuracy"])


def test_the_chosen_trial_is_not_trained_again(adapted: tuple[AdaptResult, Path]):
    result, out = adapted
    # One epoch each: the search for the proxy's rate, the proxy, and every trial.
    assert len(EPOCHS) == 3 + 1 + len(result.trials)
    assert not list(out.glob("**/*.checkpoint*"))


def test_the_adapter_keeps_the_accuracies_on_the_test_rows(adapted: tuple[AdaptResult, Path]):
    result, out = adapted
    for score, (_, row) in zip(
        Adapter.load(out / "adapter").scores, result.languages.iterrows(), strict=True
    ):
        assert (score.role, score.split) == (row["language"], "test")
        assert score.examples == row["examples"]
        for value, name in ((score.before, "before"), (score.after, "after")):
            assert value == tuple(row[[name, f"{name}_low", f"{name}_high"]])


def test_the_best_trial_is_chosen_on_validation_rows(adapted: tuple[AdaptResult, Path]):
    result, _ = adapted
    trials = result.trials
    assert trials["run"].tolist() == [
        "heads", "lora", "norms", "full", "many-heads", "few-heads", "near-zero"
    ]  # fmt: skip
    keys = list(zip(trials["target_accuracy"], -trials["target_loss"], strict=True))
    best = trials.iloc[keys.index(max(keys))]
    assert (result.chosen, result.learning_rate) == (best["run"], best["learning_rate"])


def test_the_exported_model_answers_in_plain_transformers_as_it_was_judged(
    learnt: tuple[AdaptResult, Path],
):
    result, out = learnt
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    ids = {label: tokenizer(word, add_special_tokens=False).input_ids[-1]
           for label, word in VERBALIZER.items()}  # fmt: skip
    for row in result.languages.to_dict("records"):
        rows = rows_of(out / "rows" / row["language"] / "test.csv")
        right = 0
        for example in rows:
            tokens = tokenizer(TEMPLATE.format(text=example["text"]), return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(tokens).logits[0, -1]
            right += max(ids, key=lambda label: logits[ids[label]]) == example["label"]
        assert row["after"] == pytest.approx(right / len(rows), abs=1e-12)


def test_the_loss_on_text_is_that_of_plain_transformers(learnt: tuple[AdaptResult, Path]):
    """The end of the template is left out. The first token of a prompt has nothing before it."""
    result, out = learnt
    tokenizer = AutoTokenizer.from_pretrained(out / "proxy")
    models = [AutoModelForCausalLM.from_pretrained(out / name) for name in ("proxy", "model")]
    assert result.texts["language"].tolist() == ["target", "source"]
    for found in result.texts.to_dict("records"):
        rows = rows_of(out / "rows" / found["language"] / "test.csv")
        prompts = [tokenizer(TEMPLATE.format(text=row["text"])).input_ids for row in rows]
        start, end = 1, 1  # All begin with one token, and the template ends with one word.
        assert len({prompt[-end] for prompt in prompts}) == 1
        assert min(len({prompt[place] for prompt in prompts}) for place in (start, -end - 1)) > 1
        losses: list[list[float]] = []
        for model in models:
            own: list[float] = []
            for prompt in prompts:
                with torch.no_grad():
                    logits = model(torch.tensor([prompt])).logits[0].double()
                places = range(start, len(prompt) - end)
                nats = -logits.log_softmax(-1)
                own.append(sum(float(nats[i - 1, prompt[i]]) for i in places))
            losses.append(own)
        counts = [len(prompt) - end - start for prompt in prompts]
        tokens = sum(counts)
        assert (found["examples"], found["tokens"]) == (len(rows), tokens)
        for own, name in zip(losses, ("before", "after"), strict=True):
            assert found[name] == pytest.approx(sum(own) / tokens, rel=1e-5)
        # The interval of a ratio of two means, by linearisation.
        change = (sum(losses[1]) - sum(losses[0])) / tokens
        rest = [
            (new - old - change * n) * len(rows) / tokens
            for old, new, n in zip(*losses, counts, strict=True)
        ]
        half = t.ppf(0.975, len(rows) - 1) * stdev(rest) / len(rows) ** 0.5
        assert found["change"] == pytest.approx(change, abs=1e-5)
        assert found["change_low"] == pytest.approx(change - half, abs=1e-5)
        assert found["change_high"] == pytest.approx(change + half, abs=1e-5)


def test_a_result_of_an_older_version_has_no_losses_on_text(
    adapted: tuple[AdaptResult, Path], tmp_path: Path
):
    result, _ = adapted
    result.save(tmp_path / "adapt.json")
    body = json.loads((tmp_path / "adapt.json").read_text("utf-8"))
    for name in ("texts", "format", "version", "sha256", "tensors"):
        body.pop(name, None)
    save_artifact(tmp_path / "adapt.json", body, format="cdt_lens.adapt", version=1)
    older = AdaptResult.load(tmp_path / "adapt.json")
    assert older.texts.empty and older.languages.equals(result.languages)
    page = render_report(older, path=tmp_path / "report.html").read_text("utf-8")
    assert "Loss of the language model" not in page


def test_the_changes_explain_the_difference(adapted: tuple[AdaptResult, Path]):
    result, _ = adapted
    for row in result.languages.to_dict("records"):
        own = result.changes[result.changes["language"] == row["language"]]
        gained = int((own["after"] == own["label"]).sum())
        lost = int((own["before"] == own["label"]).sum())
        assert row["change"] == pytest.approx((gained - lost) / row["examples"], abs=1e-9)


def test_the_result_is_kept_and_nothing_is_trained_twice(
    adapted: tuple[AdaptResult, Path], place: Path, monkeypatch
):
    result, out = adapted
    assert AdaptResult.load(out / "adapt.json") == result
    assert "What was tried" in (out / "report.html").read_text("utf-8")
    trained: list[Any] = []
    true = adapting.finetune
    monkeypatch.setattr(adapting, "_FACTORS", ())
    monkeypatch.setattr(adapting, "finetune", lambda *a, **k: trained.append(k) or true(*a, **k))
    for damage, n in ((False, 0), (True, 1)):
        if damage:  # Only the chosen run is trained; the trials and the proxy are kept.
            (out / "adapt.json").write_text("{}", "utf-8")
        said: list[str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CdtLensWarning)
            again = run_adapt(settings(place), out, said.append, progress=False)
        kept = f"{out}: using the kept result; the test rows are not read again"
        assert (kept in said, len(trained)) == (not damage, n)
        assert again.chosen == result.chosen
        assert again.languages.equals(result.languages)


def test_a_run_that_does_not_fit_into_memory_is_left_out(
    adapted: tuple[AdaptResult, Path], place: Path, tmp_path: Path, monkeypatch
):
    """The allocator is that of the machine, so the test raises its error."""
    monkeypatch.setattr(adapting, "_FACTORS", ())
    monkeypatch.setattr(adapting, "_ORDER", ("full", "norms"))
    true = cells.finetune

    def small(*args: Any, **options: Any) -> Any:
        if options["scope"] == "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return true(*args, **options)

    monkeypatch.setattr(cells, "finetune", small)
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)
        given = settings(place, model=str(place / "run" / "proxy"), ready=True)
        result = run_adapt(given, tmp_path, said.append, progress=False)
    assert "search: full-1: left out, because the memory is too small for it" in said
    assert result.trials["run"].tolist() == ["full", "norms"] and result.chosen == "norms"
    assert result.trials["target_loss"].isna().tolist() == [True, False]


def test_the_time_ends_the_search_and_more_of_it_goes_on(place: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(adapting, "_FACTORS", (3.0,))
    monkeypatch.setattr(adapting, "_ORDER", ("norms", "heads"))
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)
        first = run_adapt(settings(place, minutes=1e-4), tmp_path, said.append, progress=False)
        told = "the time is over; not tried: heads, norms at 3 times its rate. "
        assert [line for line in said if line.startswith(told)]
        assert first.trials["run"].tolist() == ["norms"]
        said.clear()
        more = run_adapt(settings(place, minutes=30), tmp_path, said.append, progress=False)
    assert more.trials["run"].tolist() == ["norms", "heads", *more.trials["run"][2:]]
    assert len(more.trials) == 4 and more.trials["seconds"][0] == first.trials["seconds"][0]
    assert f"{tmp_path / 'proxy'}: using the kept result" in said
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)
        less = run_adapt(settings(place, minutes=1e-4), tmp_path, quiet, progress=False)
    assert less.trials.equals(more.trials) and less.chosen == more.chosen


def test_a_refused_call_and_a_killed_one_leave_nothing_wrong(
    adapted: tuple[AdaptResult, Path], place: Path, tmp_path: Path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(adapted[1], out)
    monkeypatch.setattr(adapting, "_FACTORS", ())
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    more = changed_rows(
        tmp_path / "more.csv", [*rows_of(place / "target.csv"), *rows_of(place / "source.csv")]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)
        for changes in ({"seed": 1}, {"target": {"train": more}}):
            with pytest.raises(InputError, match="adapted with other rows .* name another folder"):
                run_adapt(settings(place, **changes), out, quiet, progress=False)
        (out / "adapt.json").unlink()
        with pytest.raises(InputError, match="other settings"):
            run_adapt(settings(place, seed=1), out, quiet, progress=False)
        changed = {
            path for path, held in files.items() if path.exists() and path.read_bytes() != held
        }
        assert not changed
        (out / "adapt.json").write_bytes(files[out / "adapt.json"])

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Adapter, "save", killed)
            run_adapt(settings(place, keep=0.4), out, quiet, progress=False)
    assert not (out / "adapt.json").exists()


@pytest.fixture
def project(place: Path, tmp_path: Path) -> Path:
    """A folder of a person, with the names of a run."""
    folder = tmp_path / "project"
    shutil.copytree(place / "tiny", folder / "model")
    for language in ("source", "target"):
        (folder / "rows" / language).mkdir(parents=True)
        shutil.copy(place / f"{language}.csv", folder / "rows" / language / "train.csv")
    return folder


def refused(given: AdaptSettings, folder: Path, told: str) -> None:
    """Check that a call is refused and leaves every file as it is."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with warnings.catch_warnings(), pytest.raises(InputError, match=told):
        warnings.simplefilter("ignore", CdtLensWarning)
        run_adapt(given, folder, quiet, progress=False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_the_model_and_the_rows_of_a_person_are_not_overwritten(
    place: Path, project: Path, tmp_path: Path, monkeypatch
):
    rows = project / "rows"
    model = {"model": str(project / "model")}
    refused(settings(place, **model), project, "would replace the model, .*model, with files of")
    monkeypatch.chdir(project)  # However the path is spelt.
    refused(settings(place, model="model"), tmp_path / "project", "replace the model, model, with")
    for language in ("source", "target"):
        given = settings(place, **{language: {"train": str(rows / language / "train.csv")}})
        refused(given, project, f"would replace the {language} train rows, .* name another folder")
    # The names alone make it no run, where other rows and another model are given.
    refused(settings(place), project, "holds other files, such as model, and no run")
    shutil.rmtree(project / "model")
    refused(settings(place), project, "holds other files, such as rows, and no run")


def test_a_folder_does_not_adapt_its_own_proxy(adapted: tuple[AdaptResult, Path], place: Path):
    given = settings(place, model=str(adapted[1] / "proxy"), ready=True)
    refused(given, adapted[1], "would replace the model, .*proxy, with files of its own")


def test_a_call_that_ended_before_its_settings_were_written_resumes(
    place: Path, tmp_path: Path, monkeypatch
):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("ignore", CdtLensWarning)
        patch.setattr(adapting.Transfer, "prepare", stopped)
        for left in ("all rows", "some rows"):
            with pytest.raises(KeyboardInterrupt):
                run_adapt(settings(place), tmp_path, quiet, progress=False)
            assert [path.name for path in tmp_path.iterdir()] == ["rows"], left
            (tmp_path / "rows" / "target" / "valid.csv").unlink()
    refused(settings(place, seed=1), tmp_path, "holds other files, such as rows")


def test_one_file_for_both_languages_is_refused(place: Path, monkeypatch):
    source = str(place / "source.csv")
    monkeypatch.chdir(place)
    for target, split in (("source.csv", "train"), (source, "test")):
        told = f"{target}: is the source's file for train and the target's file for {split}"
        with pytest.raises(InputError, match=re.escape(told)):
            settings(place, target={"train": str(place / "target.csv"), split: target})


def test_a_finished_run_keeps_its_settings(
    adapted: tuple[AdaptResult, Path], place: Path, tmp_path: Path
):
    """Those that an older version did not know had their defaults. A setting of its own is gone."""
    out = tmp_path / "run"
    shutil.copytree(adapted[1], out)
    result = AdaptResult.load(out / "adapt.json")
    refused(settings(place, epochs=2), out, r"with other settings \(epochs: 1, now 2\); name anoth")
    refused(
        settings(place, dtype="bfloat16", ready=True, keep=0.4), out,
        r"settings \(dtype: 'float32', now 'bfloat16', ready: False, now True\)",
    )  # fmt: skip
    older = {**result.settings, "backend": "bridge"}
    del older["set_aside"]
    replace(result, settings=older).save(out / "adapt.json")
    refused(settings(place, set_aside=0.21), out, r"\(set_aside: 0.2, now 0.21\)")
    shutil.copy(place / "target.csv", tmp_path / "same.csv")
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)
        same = settings(place, device="cpu", target={"train": str(tmp_path / "same.csv")})
        run_adapt(same, out, said.append, progress=False)
    assert said == [f"{out}: using the kept result; the test rows are not read again"]


def test_the_folder_of_a_transfer_is_refused(
    adapted: tuple[AdaptResult, Path], place: Path, tmp_path: Path
):
    kept = kept_settings(adapted[1] / "transfer.json", RUN_FORMAT)
    kept["discovery"] |= {"minutes": None, "examples": 8}
    save_artifact(tmp_path / "transfer.json", {"settings": kept}, format=RUN_FORMAT, version=1)
    with warnings.catch_warnings(), pytest.raises(InputError, match="other settings .discovery."):
        warnings.simplefilter("ignore", CdtLensWarning)
        run_adapt(settings(place), tmp_path, quiet, progress=False)


@pytest.mark.parametrize(("scope", "dtype"), [("lora", "bfloat16"), ("norms", "float32")])
def test_what_is_judged_is_what_is_exported(
    scope: str,
    dtype: str,
    learnt: tuple[AdaptResult, Path],
    tmp_path: Path,
    monkeypatch,
):
    """The proxy that is given is in bfloat16. A merged LoRA is rounded; float32 weights are not.

    An export in the base's type is only refused where it loses much; here nothing counts as much.
    """
    monkeypatch.setattr("cdt_lens.finetuning.export.is_lost", lambda *_: False)
    proxy = AutoModelForCausalLM.from_pretrained(learnt[1] / "proxy").to(torch.bfloat16)
    proxy.save_pretrained(tmp_path / "proxy")
    AutoTokenizer.from_pretrained(learnt[1] / "proxy").save_pretrained(tmp_path / "proxy")
    write_words(tmp_path)
    monkeypatch.setattr(adapting, "_FACTORS", (10.0, 30.0))
    monkeypatch.setattr(adapting, "_ORDER", (scope,))
    judged: list[tuple[Task, float]] = []
    true = adapting.evaluate

    def recorded(model: Any, examples: Any, task: Task) -> Any:
        found = true(model, examples, task)
        judged.append((task, found.loss))
        return found

    monkeypatch.setattr(adapting, "evaluate", recorded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)
        given = settings(
            tmp_path, model=str(tmp_path / "proxy"), ready=True, dtype=dtype, keep=0.05, epochs=3
        )
        result = run_adapt(given, tmp_path / "run", quiet, progress=False)
    assert result.exported
    exported = load_model(tmp_path / "run" / "model", backend="bridge", dtype=getattr(torch, dtype))
    assert AutoConfig.from_pretrained(tmp_path / "run" / "model").dtype == getattr(torch, dtype)
    for task, loss in judged[-2:]:
        assert true(exported, task.test, task).loss == loss


def test_a_run_that_forgets_too_much_is_tried_at_a_lower_rate_at_once(
    place: Path, tmp_path: Path, monkeypatch
):
    """The languages contradict each other: what learns the one forgets what is right by chance."""
    monkeypatch.setattr(adapting, "_ORDER", ("full",))
    labels = list(VERBALIZER)
    files = {}
    for language, turn in (("source", 0), ("target", 1)):
        rows = [
            {
                "text": f"w{20 + i // 40} w{60 + i % 3} w{70 + i % 40}",
                "label": labels[(i + turn) % 3],
            }
            for i in range(2100)
        ]
        files[language] = {"train": changed_rows(tmp_path / f"{language}.csv", rows)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)
        given = settings(place, **files, ready=True, keep=0.95)
        found = run_adapt(given, tmp_path / "run", quiet, progress=False).trials
    assert found["epoch"][0] == 0
    usual = found["learning_rate"][0]
    assert found["learning_rate"].tolist() == pytest.approx([usual, 0.3 * usual, 3 * usual])


def tables_of(given: AdaptSettings) -> dict[str, adapting.Table]:
    files = {split: adapting.read_table(path) for split, path in given.target.items()}
    return adapting._tables(given, files, "target")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(path)


def changed_rows(path: Path, rows: list[Mapping[str, str]]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_what_cannot_be_learnt_is_refused_before_anything_runs(place: Path, tmp_path: Path):
    rows = rows_of(place / "target.csv")
    one = changed_rows(tmp_path / "one.csv", [{**row, "label": "good"} for row in rows])
    few = changed_rows(tmp_path / "few.csv", rows[:12])
    words = VERBALIZER | {"awful": " w13"}
    new = changed_rows(tmp_path / "new.csv", [*rows, *({**r, "label": "awful"} for r in rows[:20])])
    cases = {
        one: "target: the train rows have one label \\('good'\\)",
        few: "target: 4 rows have the label 'bad'; expected at least 10 of each label",
        new: "target: 12 rows have the label 'awful', which no row of the source has",
    }
    for path, told in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CdtLensWarning)
            with pytest.raises(InputError, match=told):
                given = settings(place, verbalizer=words, target={"train": path})
                run_adapt(given, tmp_path / "none", quiet)
    least = changed_rows(tmp_path / "least.csv", rows[:30])
    tables = tables_of(settings(place, target={"train": least}))
    assert {split: len(table.rows) for split, table in tables.items()} == {
        "train": 18, "valid": 6, "test": 6,
    }  # fmt: skip
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="no column 'lable'"):
        run_adapt(settings(place, label_column="lable"), tmp_path / "none", quiet)
    rows_at = str(place / "target.csv")
    misspelt = settings(place, target={"train": rows_at, "vaild": rows_at})
    with pytest.raises(InputError, match="target: expected splits among .*, got .*'vaild'"):
        run_adapt(misspelt, tmp_path / "none", quiet)


@pytest.mark.parametrize(("language", "split"), [("target", "train"), ("source", "valid")])
@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"text": ["w20", "w30"]}, ", column 'text': expected text, got list ['w20', 'w30']"),
        ({"text": "w20 \ud83d"}, ", column 'text', character 5: half of a character"),
        ({"text": " "}, ", column 'text': empty"),
        ({"text": "w20 </s>"}, ", column 'text': the text holds '</s>'"),
        ({"text": "w20 " * 30}, ": the prompt has 32 tokens, the limit is 31"),
        ({"label": "good "}, ", column 'label': unknown label 'good '"),
        ({"label": "Good"}, ", column 'label': unknown label 'Good'"),
        ({"label": None}, ", column 'label': empty"),
        ({"label": ["good"]}, ", column 'label': expected text, got list ['good']"),
    ],
)
def test_a_wrong_cell_is_told_at_its_line_in_the_users_file(
    cells: dict[str, Any], told: str, language: str, split: str, place: Path, tmp_path: Path
):
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny", model_max_length=31)
    tokenizer.save_pretrained(tmp_path / "tiny")
    shutil.copy(place / "tiny" / "config.json", tmp_path / "tiny")
    rows: list[dict[str, Any]] = [*rows_of(place / "target.csv")]
    rows[2] |= cells
    path = jsonl(tmp_path / "rows.jsonl", rows)
    files = {"train": str(place / "source.csv"), split: path}
    given = settings(place, model=str(tmp_path / "tiny"), **{language: files})
    with pytest.raises(InputError, match=re.escape(f"{path}, line 3{told}")):
        run_adapt(given, tmp_path / "run", quiet, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.jsonl", '{"txt": "w20", "label": "good"}', ", line 1: no column 'text'"),
        (
            "rows.csv", "text;label\nw20;good",
            ", line 1 (the header): no column 'text'; the columns are 'text;label'. The cells seem "
            "to be separated by semicolons.",
        ),
    ],
)  # fmt: skip
def test_a_wrong_column_is_told_as_for_every_file(
    name: str, content: str, told: str, place: Path, tmp_path: Path
):
    (tmp_path / name).write_text(content, "utf-8")
    given = settings(place, target={"train": str(tmp_path / name)})
    with pytest.raises(InputError, match=f"^{re.escape(f'{tmp_path / name}{told}')}"):
        run_adapt(given, tmp_path / "run", quiet, progress=False)


def test_a_share_that_leaves_no_row_to_train_on_is_refused(place: Path, tmp_path: Path):
    least = changed_rows(tmp_path / "least.csv", rows_of(place / "target.csv")[:30])
    told = "target: set_aside=0.49 leaves no row with the label 'bad' to train on"
    with pytest.raises(InputError, match=told):
        tables_of(settings(place, target={"train": least}, set_aside=0.49))
    one_left = tables_of(settings(place, target={"train": least}, set_aside=0.45))
    assert len(one_left["train"].rows) == len(VERBALIZER)
    given = settings(
        place,
        source={"train": str(place / "target.csv")},
        target={"train": least, "valid": least, "test": str(place / "source.csv")},
    )
    with (
        pytest.raises(InputError, match="target: all rows to train on are also in the other files"),
        pytest.warns(CdtLensWarning, match="30 of 30 rows to train on"),
    ):
        tables_of(given)


def test_half_a_character_in_a_column_that_no_prompt_reads(place: Path, tmp_path: Path):
    rows = [{**row, "annotator": "\ud83d"} for row in rows_of(place / "target.csv")]
    given = settings(place, target={"train": jsonl(tmp_path / "rows.jsonl", rows)})
    adapting._write_rows({"target": tables_of(given)}, tmp_path)
    written = rows_of(tmp_path / "rows" / "target" / "train.csv")
    assert {row["annotator"] for row in written} == {"?"}


def test_a_finished_run_needs_no_base_model(
    adapted: tuple[AdaptResult, Path], place: Path, monkeypatch
):
    _, out = adapted
    true = adapting.load_tokenizer

    def gone(source: str | Path) -> Any:
        if source == str(place / "tiny"):
            raise InputError("no such model")
        return true(source)

    monkeypatch.setattr(adapting, "load_tokenizer", gone)
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)
        run_adapt(settings(place), out, said.append, progress=False)
    assert said == [f"{out}: using the kept result; the test rows are not read again"]


def test_rows_that_are_judged_on_are_not_learnt(place: Path, tmp_path: Path):
    rows = rows_of(place / "target.csv")
    test = changed_rows(tmp_path / "test.csv", [*rows[:6], *rows_of(place / "source.csv")[:6]])
    given = settings(place, target={"train": str(place / "target.csv"), "test": test})
    with pytest.warns(CdtLensWarning) as caught:
        tables = tables_of(given)
        adapting._check_labels(given, {"source": tables, "target": tables})
    told = [str(warning.message) for warning in caught]
    n = sum(row in rows[:6] for row in rows if row not in tables["valid"].rows)
    assert (
        f"target: {n} of 48 rows to train on are also in the validation rows or test rows"
        in told[0]
    )
    assert "12 test rows: the 95 % interval of an accuracy of 0.7 is [" in told[1]
    assert not {row["text"] for row in tables["train"].rows} & {row["text"] for row in rows[:6]}


def test_rows_are_the_same_by_prompt_and_label_whatever_the_other_columns(
    place: Path, tmp_path: Path
):
    rows = rows_of(place / "target.csv")
    paths = {}
    for name, own in (("train", rows[12:]), ("valid", rows[:12]), ("test", rows[6:18])):
        numbered = [{"annotator": f"{name} {i}", **row} for i, row in enumerate(own)]
        paths[name] = changed_rows(tmp_path / f"{name}.csv", numbered)
    given = settings(place, target=paths)
    with pytest.warns(CdtLensWarning) as caught:
        tables = tables_of(given)
    told = [str(warning.message) for warning in caught]
    assert "6 of 12 validation rows are also in the test rows" in told[0]
    assert "6 of 48 rows to train on are also in the validation rows or test rows" in told[1]
    assert {name: len(table.rows) for name, table in tables.items()} == {
        "train": 42, "valid": 6, "test": 12,
    }  # fmt: skip


def test_the_divided_rows_are_those_of_the_file(place: Path, tmp_path: Path):
    """Whole numbers stay whole beside a fraction or a gap, and a line break stays in its cell."""
    texts = ["one\r\ntwo", "one\rtwo", "one\ntwo", 'a "quoted", one', ""]
    rows = [
        {"text": f"{texts[i % 5]} {i}", "stars": [3, 2.5, None][i % 3], "label": ["bad", "good"][i % 2]}
        for i in range(60)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    given = settings(
        place, template="{text} {stars} w3", target={"train": str(tmp_path / "rows.jsonl")}
    )
    tables = tables_of(given)
    files = adapting._row_files({"target": tables}, tmp_path)
    adapting._write_rows({"target": tables}, tmp_path)
    for path in files:
        again = adapting.read_table(str(path))
        own = tables[path.stem]
        wanted = [{k: "" if v is None else str(v) for k, v in row.items()} for row in own.rows]
        assert [dict(row) for row in again.rows] == wanted
    assert all(adapting._holds(path, text) for path, text in files.items())


@pytest.mark.parametrize("mistake", [{"template": "{txt} w3"}, {"verbalizer": {"bad": " w10"}}])
def test_a_mistake_can_be_mended_in_the_same_folder(
    mistake, place: Path, tmp_path: Path, monkeypatch
):
    """What was refused has left no settings that would refuse the right ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)
        with pytest.raises(InputError):
            run_adapt(settings(place, **mistake), tmp_path / "run", quiet)
        monkeypatch.setattr(adapting, "discover", lambda *_: pytest.fail("it went on"))
        with pytest.raises(pytest.fail.Exception, match="it went on"):
            run_adapt(settings(place), tmp_path / "run", quiet, progress=False)


def test_every_setting_is_read():
    """`backend` was a setting that had no effect, and the page showed it."""
    code = inspect.getsource(adapting)
    names = [item.name for item in fields(AdaptSettings)]
    assert [name for name in names if not re.search(rf"\b(s|settings)\.{name}\b", code)] == []


def test_a_search_in_which_nothing_can_be_trained_ends_with_one_error(
    adapted: tuple[AdaptResult, Path], place: Path, tmp_path: Path, monkeypatch
):
    """The allocator is that of the machine, so the test raises its error."""

    def small(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(adapting, "_ORDER", ("norms",))
    monkeypatch.setattr(cells, "finetune", small)
    given = settings(place, model=str(adapted[1] / "proxy"), ready=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)
        with pytest.raises(
            InputError, match="no run could be trained: norms, norms, norms diverged"
        ):
            run_adapt(given, tmp_path, quiet, progress=False)
