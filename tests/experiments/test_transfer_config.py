"""The TOML file of a transfer experiment: read whole, defaults filled, every mistake named."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from helpers.checks import unchecked_types
from helpers.places import ROOT

from cdt_lens.core.artifacts import load_artifact
from cdt_lens.core.choices import Preset
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.rules import PRESETS
from cdt_lens.experiments.settings import CircuitSettings, Settings, values_of
from cdt_lens.experiments.transfer import _set
from cdt_lens.experiments.transfer_config import config_of, read_config

LEAST = {"model": "m", "task": {"name": "files", "source": "a", "targets": ["b", "c"]}}


def test_a_whole_file(tmp_path: Path):
    path = tmp_path / "t.toml"
    path.write_text(
        """
        model = "models/x"
        dtype = "bfloat16"
        [task]
        name = "pseudo-sentiment"
        source = "source"
        targets = ["0.3", "0.8"]
        sizes = [30, 12, 12]
        [proxy]
        examples = 200
        epochs = 5
        [discovery]
        fraction = 0.2
        [transfer]
        seeds = [3, 4]
        epochs = 7
        norms = "circuit"
        [transfer.learning_rates]
        near-zero = 1e-4
        """
    )
    read = read_config(path)
    assert read.task.targets == ("0.3", "0.8") and read.task.sizes == (30, 12, 12)
    assert (read.proxy.examples, read.proxy.training.epochs) == (200, 5)
    assert read.discovery.fraction == 0.2 and read.discovery.k is None
    assert read.transfer.seeds == (3, 4)
    assert (read.transfer.training.epochs, read.transfer.training.norms) == (7, "circuit")
    assert read.transfer.learning_rates == {"near-zero": 1e-4}
    assert read.dtype == "bfloat16" and read.backend == "bridge"
    # The proxy's training options are its own.
    assert read.proxy.training.norms == "all"


def test_what_is_kept_in_a_run_reads_back():
    config = config_of(LEAST | {"transfer": {"epochs": 2, "scopes": ["full", "norms"]}})
    assert config_of(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"modle": "x"}, "settings: unknown key 'modle'; did you mean 'model'?"),
        ({"model": 3}, "settings: model=3: expected text"),
        ({"task": {"name": "files", "source": "a"}}, r"\[task\]: targets is missing"),
        (
            {"task": {"name": "x", "source": "a", "targets": "b"}},
            r"\[task\]: targets='b': expected a list",
        ),
        (
            {"task": {"name": "x", "source": "a", "targets": []}},
            r"\[task\]: targets: .*at least one",
        ),
        ({"task": {"name": "x", "source": "a", "targets": ["b", "b"]}}, "each once"),
        ({"task": {"name": "x", "source": "a", "targets": ["a"]}}, "'a' is the source"),
        ({"task": 4}, r"task: expected a section \[task\], got 4"),
        ({"proxy": {"epoch": 2}}, r"\[proxy\]: unknown key 'epoch'; did you mean 'epochs'?"),
        ({"proxy": {"epochs": -1}}, r"\[proxy\]: training: epochs=-1: expected .*at least 0"),
        (
            {"proxy": {"epochs": "many"}},
            r"\[proxy\]: training: epochs='many': expected a whole number",
        ),
        ({"transfer": {"scopes": ["decison"]}}, "'decison': unknown; did you mean 'decision'?"),
        ({"transfer": {"learning_rates": {"loar": 1e-3}}}, "'loar': unknown; did you mean 'lora'?"),
        ({"transfer": {"seeds": []}}, r"\[transfer\]: seeds: expected at least one"),
        (
            {"transfer": {"variants": {"x": {"scope": "norms", "k": 3}}}},
            r"\[transfer.variants.x\]: k: for the scope decision or near-zero",
        ),
        (
            {"transfer": {"variants": {"x": {"scope": "lora", "match": "y"}}}},
            "variants: x: match='y': expected one of full, decision",
        ),
        (
            {"transfer": {"variants": {"x": {"scope": "decision", "epoch": 2}}}},
            r"\[transfer.variants.x\]: unknown key 'epoch'; did you mean 'epochs'?",
        ),
        (
            {"transfer": {"variants": {"norms": {"scope": "norms", "epochs": 2}}}},
            "'norms' is the name of a scope; give it another name",
        ),
        (
            {
                "transfer": {
                    "variants": {"x": {"scope": "random", "sets": 1}, "x-1": {"scope": "norms"}}
                }
            },
            "two of the runs have the same name",
        ),
        (
            {
                "task": {
                    **LEAST["task"],
                    "name": "nusax-senti",
                    "files": {"b": {"train": "train.csv"}},
                }
            },
            r"\[task\]: task 'nusax-senti': has data of its own; .*leave out the files \(b\)",
        ),
        (
            {"related": {"name": "ioi", "files": {"test": "test.csv"}}},
            r"\[related\]: task 'ioi': has data of its own",
        ),
        (
            {"transfer": {"variants": {"x": {"scope": "full", "draw": 1}}}},
            r"\[transfer.variants.x\]: draw: for the scope random or random-per-layer, not full",
        ),
        (
            {"transfer": {"variants": {"x": {"scope": "random", "sets": 2, "draw": 1}}}},
            "draw: sets has its own draws; give one of both",
        ),
        (
            {"transfer": {"variants": {"x": {"scope": "lora", "match": "full", "lora_rank": 4}}}},
            "lora_rank: match chooses it; omit it, or omit match",
        ),
        (
            {"transfer": {"variants": {"x": {"scope": "full", "training": 5}}}},
            r"\[transfer.variants.x\]: training: expected a section, got 5",
        ),
        ({"related": 0}, r"settings: related: expected a section \[related\], got 0"),
        ({"related": {}}, r"settings: \[related\]: name is missing"),
        ({"protocol": "papre"}, "protocol='papre': expected one of tuned, paper"),
        ({"dtype": "float16"}, "dtype='float16': expected one of float32, bfloat16, float64"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], told: str):
    with unchecked_types(), pytest.raises(InputError, match=told):
        config_of(LEAST | change)


@pytest.mark.parametrize("language", ["b", "0.3", "bahasa ac\u00e8h"])
def test_the_section_that_is_asked_for_can_be_written_so(language: str):
    config = config_of({**LEAST, "task": {**LEAST["task"], "targets": [language]}})
    with pytest.raises(InputError) as caught:
        config.settings(language)
    section = re.search(r"\[task\.files\..*?\](?= )", str(caught.value))
    assert section is not None
    assert tomllib.loads(section.group()) == {"task": {"files": {language: {}}}}


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.toml: cannot be read"):
        read_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("model = ")
    with pytest.raises(InputError, match=r"broken\.toml: not a TOML file: "):
        read_config(broken)


@pytest.mark.parametrize("protocol", ["tuned", "paper"])
def test_a_ready_checkpoint_takes_no_keys_of_a_training(protocol: str, tmp_path: Path):
    path = tmp_path / "t.toml"
    text = f"""
        model = "m"
        protocol = "{protocol}"
        [task]
        name = "nusax-senti"
        source = "a"
        targets = ["b"]
        [proxy]
        checkpoint = "c"
        """
    path.write_text(text)
    read = read_config(path)
    assert read.proxy.checkpoint == "c" and config_of(read.to_dict()) == read
    told = {
        "epochs = 2\nsearch = [1.0]": "epochs, search", "examples = 5": "examples",
        "[proxy.training]\nepochs = 2": "training",
    }  # fmt: skip
    for more, names in told.items():
        path.write_text(text + more)
        words = rf"t\.toml: \[proxy\]: {names} would have no effect with checkpoint"
        with pytest.raises(InputError, match=words):
            read_config(path)


def test_a_section_keeps_its_own_defaults():
    config = config_of(LEAST | {"proxy": {"learning_rate": 3e-5}})
    assert config.proxy.training.epochs == 2
    assert config.proxy.training.learning_rate == 3e-5


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("discovery", {"k": 0}, "k=0: expected a whole number of at least 1"),
        ("discovery", {"k": 3, "fraction": 0.1}, "expected k or fraction, got both"),
        ("discovery", {"fraction": 7}, "fraction=7: expected a number above 0 and of at most 1"),
        ("discovery", {"rules": "stabel"}, "rules='stabel': .*did you mean 'stable'?"),
        ("transfer", {"examples": -1}, "examples=-1: expected a whole number of at least 1"),
        (
            "transfer",
            {"seeds": [0, -1]},
            r"\[transfer\]: seeds=\[0, -1\]: expected a list; 1: .*greater than or equal to 0",
        ),
        ("proxy", {"seed": -1}, "seed=-1: expected .*at least 0"),
        ("transfer", {"seed": 3}, r"\[transfer\] has no option `seed`; write `seeds = \[3\]`"),
        (
            "transfer",
            {"learning_rates": {"full": 0}},
            "learning_rates=.*; full: Input should be greater than 0",
        ),
        ("proxy", {"training": {"epohcs": 9}}, "'epohcs': unknown; did you mean 'epochs'?"),
        ("proxy", {"training": 3}, "training: expected a section, got 3"),
    ],
)
def test_values_out_of_range_are_told_before_anything_runs(
    section: str, change: dict[str, object], told: str
):
    with pytest.raises(InputError, match=told):
        config_of(LEAST | {section: change})


def test_a_negative_seed_of_the_data_is_refused():
    with pytest.raises(
        InputError, match=r"\[task\]: seed=-1: expected a whole number of at least 0"
    ):
        config_of(LEAST | {"task": {**LEAST["task"], "seed": -1}})


@pytest.mark.parametrize(
    ("name", "dtype", "k"),
    [
        ("nusax", "bfloat16", 8), ("nusax-two-ended", "bfloat16", 8), ("xnli", "bfloat16", 8),
        ("gemma-nusax", "float32", 8), ("gemma-heads", "float32", 8), ("demo-sizes", "float32", 4),
        ("gemma-paper", "float32", 8),
    ],
)  # fmt: skip
def test_the_files_of_the_benchmarks_are_read(name: str, dtype: str, k: int):
    config = read_config(ROOT / "benchmarks" / f"{name}.toml")
    assert config.dtype == dtype and config.backend == "bridge"
    assert config.discovery.k == k and "decision" in config.transfer.scopes


def test_settings_that_0_3_kept_are_those_of_the_same_file_now():
    old = ROOT / "tests" / "files_0_3"
    run = load_artifact(old / "run" / "run.json", format="cdt_lens.run", version=1)[0]["settings"]
    settings = Settings.from_dict(run)
    assert (settings.task, settings.k, settings.rules) == ("files", 2, "two-ended")
    kept = load_artifact(
        old / "transfer" / "transfer.json", format="cdt_lens.transfer_run", version=1
    )[0]["settings"]
    now = json.loads(json.dumps(read_config(old / "transfer.toml").to_dict()))
    now["task"] |= {"targets": [], "files": {}}
    now["discovery"] |= {"rules": "stable", "by": "magnitude"}  # the defaults of 0.3
    assert {name: _set(now[name]) for name in kept} == {name: _set(kept[name]) for name in kept}


def test_a_transfer_finds_its_circuit_by_the_defaults_of_discover():
    config = config_of({**LEAST, "task": {**LEAST["task"], "name": "pseudo-sentiment"}})
    ours, theirs = config.settings("b"), Settings(model="m")
    assert values_of(ours, CircuitSettings) == values_of(theirs, CircuitSettings)


def test_the_presets_that_may_be_named_are_those_that_there_are():
    assert set(get_args(Preset)) == set(PRESETS)


def test_settings_made_in_python_are_checked_as_those_of_a_file():
    with unchecked_types():
        for wrong in ({"examples": 0}, {"examples": "3"}, {"fraction": 2}, {"by": "size"}):
            with pytest.raises(InputError, match=next(iter(wrong))):
                Settings(model="m", **wrong)
        assert Settings(model="m", sizes=[1, 2, 3]).sizes == (1, 2, 3)
    with pytest.raises(
        InputError, match="settings: unknown key 'exmples'; did you mean 'examples'"
    ):
        Settings.from_dict({"model": "m", "exmples": 3})


def test_a_lora_in_a_hooked_transformer_is_refused_before_anything_runs():
    task = {"name": "nusax-senti", "data": "data", "source": "english", "targets": ["acehnese"]}
    values = {"model": "tiny", "backend": "hooked", "task": task}
    with pytest.raises(InputError, match=r"a LoRA \(lora\) needs TransformerBridge"):
        config_of(values)
    config_of(values | {"transfer": {"scopes": ["full", "decision"]}})


@pytest.mark.parametrize("nested", [False, True])
def test_the_papers_values_take_the_place_of_every_key_that_is_left_out(nested: bool):
    """Also beside training options in a table of their own."""
    own: dict[str, object] = {"batch_size": 8}
    section = {"training": own} if nested else own
    read = config_of(LEAST | {"protocol": "paper", "transfer": section, "proxy": section})
    assert read.transfer.seeds == (0, 1, 2, 3) and read.proxy.training.epochs == 5
    training = read.transfer.training
    assert (training.batch_size, training.epochs, training.learning_rate) == (8, 5, 5e-5)
    assert config_of(read.to_dict()) == read


@pytest.mark.parametrize(
    ("every", "epochs", "race", "read"),
    [(1, 3, 1, 1), (2, 6, 1, 2), (2, 3, 3, 3), (3, 3, 1, 3), (2, 6, 4, 4)],
)
def test_the_race_is_read_at_an_evaluation(every: int, epochs: int, race: int, read: int):
    transfer = {"evaluate_every": every, "epochs": epochs, "race_epochs": race}
    assert config_of(LEAST | {"transfer": transfer}).transfer.race_epoch == read
