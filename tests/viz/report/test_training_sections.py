from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import sample_results as sample

from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.viz.report.sections import Section
from cdt_lens.viz.report.training_sections import fine_tune_section, transfer_section


def tuning(result: FineTuneResult) -> Section:
    return fine_tune_section(result, "s1", [result])


def transfer(result: TransferResult) -> Section:
    return transfer_section(result, "s1", [result])


def captions(section: Section) -> list[str]:
    return [table.caption for table in section.tables]


def test_a_fine_tuning_is_headed_by_the_accuracy_before_and_after():
    section = tuning(sample.fine_tuning())
    assert section.headline[0] == "0.490 \u2192 0.720"
    assert section.title == "Fine-tuning: decision"
    assert section.facts == {
        "Scope": "decision",
        "Heads trained": "27 of 270 (10.0%)",
        "Siblings (share a trained K/V slice)": "48",
        "Parameters trained": "1,343,808 of 134,515,008 (0.999 %)",
        "Best epoch": "4 of 10",
        "Stopped": "early: no better for 2 evaluations",
        "Time": "93.4 s",
        "Source retention": "0.968 (0.790 \u2192 0.765)",
    }
    assert [name for name, _ in section.provenance] == ["Fine-tuning: decision"]


def test_only_scopes_with_heads_have_a_map():
    section = tuning(sample.fine_tuning())
    titles = [figure.title for figure in section.figures]
    assert titles == ["Learning curve: decision", "Trained heads: decision"]
    norms = tuning(sample.fine_tuning("norms"))
    assert len(norms.figures) == 1
    assert "Heads trained" not in norms.facts


def test_a_training_that_never_helped_keeps_the_untouched_weights_and_says_so():
    section = tuning(replace(sample.fine_tuning(), best_epoch=0))
    assert section.facts["Best epoch"] == "0 of 10 (the untouched weights)"
    assert section.headline[0] == "0.490 \u2192 0.490"


def test_what_was_not_measured_reads_as_such():
    assert tuning(sample.fine_tuning(source=False)).facts["Source retention"] == "n/a"
    result = sample.fine_tuning()
    blind = replace(result, history=result.history.assign(target_accuracy=np.nan))
    assert tuning(blind).headline[0] == "n/a"


def test_a_transfer_is_headed_by_decision_beside_full_over_the_same_targets():
    result = sample.transfer(("a", "b", "c"), ("decision", "full"), seeds=(0,))
    cells = result.cells.assign(accuracy=[0.7, 0.6, 0.8, 0.7, 0.9, np.nan])  # c: full is missing
    section = transfer(replace(result, cells=cells))
    # The untouched checkpoint has 0.5 and 0.47 on a and b.
    assert section.headline[0] == "0.485 \u2192 0.750"
    assert "(full: 0.650), mean of 2 targets" in section.headline[1]
    assert section.title == "Transfer: nusax-senti from english"


def test_seeds_that_diverged_are_counted_apart_and_told_beside_the_mean():
    result = sample.transfer(("a", "b"), ("decision", "full"), seeds=(0, 1))
    section = transfer(result)
    assert section.facts["Runs finished"] == "8 of 8"
    more = replace(result, settings={"transfer": {"seeds": [0, 1, 2]}})
    assert transfer(more).facts["Runs finished"] == "8 of 12"
    assert section.headline[1].endswith("mean of 2 targets")
    cells = result.cells.assign(accuracy=[0.7, np.nan, 0.6, 0.6, 0.8, 0.7, 0.9, 0.9])
    section = transfer(replace(result, cells=cells))
    assert section.facts["Runs finished"] == "7 of 8; 1 diverged"
    assert section.headline[1].endswith("mean of 2 targets, 7 of 8 runs")


def test_a_transfer_without_decision_or_full_is_headed_by_its_first_scope():
    section = transfer(sample.transfer(("a",), ("norms", "lora")))
    assert "after norms, one target" in section.headline[1]
    only_full = transfer(sample.transfer(("a",), ("full",)))
    assert "after full, one target" in only_full.headline[1]


@pytest.mark.parametrize("cells", [pd.DataFrame(), sample.transfer().cells.iloc[:0]])
def test_a_transfer_that_has_just_begun_has_a_section(cells: pd.DataFrame):
    result = replace(sample.transfer(), cells=cells, auto=pd.DataFrame(), discovery={}, settings={})
    section = transfer(replace(result, provenance=None))
    assert section.headline[0] == "n/a"
    assert section.facts["Runs finished"] == "none yet"
    assert [caption[:6] for caption in captions(section)] == ["Scopes"]
    assert section.provenance == ()


def test_a_transfer_tells_how_much_of_it_is_there_and_how_sure_an_accuracy_is():
    result = sample.transfer()
    section = transfer(replace(result, cells=result.cells.iloc[:-2]))
    assert section.facts == {
        "Task": "nusax-senti",
        "Proxy language": "english (accuracy 0.790 before)",
        "Targets": "3: javanese, sundanese, minangkabau",
        "Seeds": "0, 1, 2",
        "Runs finished": "52 of 54",
        "Chance (always the commonest label)": "javanese 0.383, sundanese 0.393, minangkabau 0.403",
        "Test examples": "400 a language (95 % interval of an accuracy at most \u00b10.049)",
        "Automatic choice right": "gap 5 of 8 (1 tie), race 5 of 8 (1 tie)",
    }
    uneven = result.before.assign(examples=[400, 100, 200, 300])
    told = transfer(replace(result, before=uneven)).facts["Test examples"]
    assert told == "100 to 400 a language (95 % interval of an accuracy at most \u00b10.096)"


def test_the_tables_stand_in_the_order_of_what_matters():
    names = [caption.split()[0] for caption in captions(transfer(sample.transfer()))]
    assert names == ["Scopes", "Automatic", "Every", "Discovery", "Settings"]
    result = sample.transfer()
    bare = replace(result, auto=result.auto.iloc[:0], discovery={})
    assert [c.split()[0] for c in captions(transfer(bare))] == ["Scopes", "Every", "Settings"]
    assert "Automatic choice right" not in transfer(bare).facts


def test_a_saved_transfer_reads_the_same(tmp_path: Path):
    path = sample.transfer().save(tmp_path / "transfer.json")
    saved, made = transfer(TransferResult.load(path)), transfer(sample.transfer())
    assert (saved.headline, saved.facts, saved.tables) == (made.headline, made.facts, made.tables)


def test_a_training_that_learnt_nothing_says_so_in_a_sentence():
    tuned = sample.fine_tuning()
    assert tuned.nothing_learnt == "" and "Outcome" not in tuning(tuned).facts
    best_is_first = replace(tuned, best_epoch=0)
    unchanged = replace(tuned, changed=False)
    for result in (best_is_first, unchanged):
        sentence = result.nothing_learnt
        assert sentence.startswith("Nothing was learnt: ")
        assert tuning(result).facts["Outcome"] == sentence
        assert "nothing was learnt" in repr(result)
        assert "Nothing was learnt" in result._repr_html_()
    assert "no epoch was better" in best_is_first.nothing_learnt
    assert "changed no weight" in unchanged.nothing_learnt


def test_a_training_whose_better_epochs_forget_too_much_says_so():
    """The numbers of a run on NusaX: three epochs learnt much, and none kept 95 %."""
    history = pd.DataFrame(
        {
            "epoch": [0, 1, 2, 3], "target_accuracy": [0.449, 0.571, 0.735, 0.735],
            "target_loss": [1.585, 0.911, 0.642, 0.68], "source_accuracy": [0.9, 0.75, 0.765, 0.7],
        }
    )  # fmt: skip
    tuned = replace(sample.fine_tuning(), best_epoch=0, history=history)
    for options, said in (
        ({"least_retention": 0.95}, "kept less than 95% of the source accuracy. Epoch 2 had a target "
         "accuracy of 0.735 (0.449 before) and kept 85% of it."),
        ({"least_retention": 0.95, "metric": "loss"}, "Epoch 2 had"),
        ({"least_retention": None}, "no epoch was better"),
        ({}, "no epoch was better"),
    ):  # fmt: skip
        assert said in replace(tuned, options=options).nothing_learnt
    tied = history.assign(target_accuracy=[0.449, 0.4, 0.449, 0.3])  # the loss decides
    still = replace(tuned, history=tied, options={"least_retention": 0.95})
    assert "kept less than 95%" in still.nothing_learnt and "Epoch 2" in still.nothing_learnt
    worse = history.assign(target_accuracy=[0.449, 0.4, 0.44, 0.3])
    still = replace(tuned, history=worse, options={"least_retention": 0.95})
    assert "no epoch was better" in still.nothing_learnt
    unjudged = history.assign(target_accuracy=np.nan, target_loss=np.nan)
    blind = replace(tuned, history=unjudged, options={"least_retention": 0.95}).nothing_learnt
    assert "every epoch kept less than 95% of the source accuracy. Epoch 3 kept 78% of it." in blind
