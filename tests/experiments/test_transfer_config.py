"""The TOML file of a transfer experiment: read whole, defaults filled, every mistake named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdt_lens.core.errors import InputError
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
        ({"model": 3}, "settings: model: .*string, got 3"),
        ({"task": {"name": "files", "source": "a"}}, r"\[task\]: targets: Field required"),
        ({"task": {"name": "x", "source": "a", "targets": "b"}}, r"\[task\]: targets: .*got 'b'"),
        ({"task": {"name": "x", "source": "a", "targets": []}}, "task.targets: .*at least one"),
        ({"task": {"name": "x", "source": "a", "targets": ["b", "b"]}}, "each once"),
        ({"task": {"name": "x", "source": "a", "targets": ["a"]}}, "'a' is the source"),
        ({"task": 4}, r"task: expected a section \[task\], got 4"),
        ({"proxy": {"epoch": 2}}, r"\[proxy\]: unknown key 'epoch'; did you mean 'epochs'?"),
        ({"proxy": {"epochs": -1}}, r"\[proxy\]: training: epochs=-1: expected .*at least 0"),
        ({"proxy": {"epochs": "many"}}, r"\[proxy\]: training.epochs: .*integer.*got 'many'"),
        ({"transfer": {"scopes": ["decison"]}}, "'decison': unknown; did you mean 'decision'?"),
        ({"transfer": {"learning_rates": {"loar": 1e-3}}}, "'loar': unknown; did you mean 'lora'?"),
        ({"transfer": {"seeds": []}}, "transfer.seeds: expected at least one"),
        ({"dtype": "float16"}, "dtype: .*got 'float16'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], told: str):
    with pytest.raises(InputError, match=told):
        config_of(LEAST | change)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.toml: cannot be read"):
        read_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("model = ")
    with pytest.raises(InputError, match=r"broken\.toml: not a TOML file: "):
        read_config(broken)


def test_a_section_keeps_its_own_defaults():
    config = config_of(LEAST | {"proxy": {"learning_rate": 3e-5}})
    assert config.proxy.training.epochs == 2
    assert config.proxy.training.learning_rate == 3e-5


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("discovery", {"k": 0}, "k=0: expected at least 1"),
        ("discovery", {"k": 3, "fraction": 0.1}, "expected k or fraction, got both"),
        ("discovery", {"fraction": 7}, "fraction=7.0: expected more than 0"),
        ("discovery", {"rules": "stabel"}, "rules='stabel': .*did you mean 'stable'?"),
        ("transfer", {"examples": -1}, "examples=-1: expected at least 1"),
        ("transfer", {"seeds": [0, -1]}, r"\[transfer\]: seeds=-1: expected at least 0"),
        ("proxy", {"seed": -1}, "seed=-1: expected .*at least 0"),
        ("transfer", {"seed": 3}, r"seed=3: expected seeds = \[3\]"),
        ("transfer", {"learning_rates": {"full": 0}}, "learning_rates: expected numbers above 0"),
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
    with pytest.raises(InputError, match=r"\[task\]: seed=-1: expected at least 0"):
        config_of(LEAST | {"task": {**LEAST["task"], "seed": -1}})
