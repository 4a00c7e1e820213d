"""The offline demo: its settings are whole, and a shortened one runs to its report and goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.saved import save_model

from cdt_lens.core.errors import InputError
from cdt_lens.experiments import demo
from cdt_lens.experiments.transfer_config import TransferConfig, config_of
from cdt_lens.finetuning.options import SCOPES


def test_the_settings_read_back_and_hold_every_control():
    config, short = demo.demo_config("m", full=True), demo.demo_config("m")
    for each in (config, short):
        assert config_of(each.to_dict()) == each
        assert set(each.transfer.learning_rates) >= set(each.transfer.scopes)
    assert set(config.transfer.scopes) >= set(SCOPES) - {"random-per-layer"}
    assert set(config.transfer.scopes) > set(short.transfer.scopes) >= {"decision", "random"}


def test_a_short_demo_runs_to_the_report(tmp_path: Path, monkeypatch):
    whole = demo.demo_config

    def short(model: str, seed: int = 0, *, full: bool = False) -> TransferConfig:
        config = whole(model, seed, full=full)
        transfer = replace(
            config.transfer, scopes=("decision", "near-zero"), seeds=(0,), examples=32,
            training=config.transfer.training.changed(epochs=1),
        )  # fmt: skip
        return replace(
            config,
            task=replace(config.task, sizes=(96, 24, 24)),
            proxy=replace(config.proxy, training=config.proxy.training.changed(epochs=1)),
            discovery=replace(config.discovery, examples=6, faithfulness_examples=6, draws=1),
            transfer=transfer,
        )

    monkeypatch.setattr(demo, "demo_config", short)
    make = demo.make_demo_model
    monkeypatch.setattr(demo, "make_demo_model", lambda *a, **kw: make(*a, **kw, steps=5))
    told: list[str] = []
    result = demo.run_demo(tmp_path / "demo", told.append, progress=False)
    assert result.targets == (demo.NEAR, demo.FAR)
    assert len(result.cells) == 4 and result.cells["accuracy"].notna().all()
    assert (tmp_path / "demo" / "report.html").exists()
    assert "<svg" in (tmp_path / "demo" / "discovery" / "heads.svg").read_text("utf-8")

    def refuse(*_a: object, **_kw: object) -> None:
        raise AssertionError("the model is there already")

    monkeypatch.setattr(demo, "make_demo_model", refuse)
    again = demo.run_demo(tmp_path / "demo", told.append, progress=False)
    assert again.cells.equals(result.cells)


def test_a_damaged_model_is_made_again_and_a_foreign_one_is_not_touched(
    tmp_path: Path, monkeypatch
):
    """The demo takes its model from the run directory: only the one that it made, whole."""
    told: list[str] = []
    monkeypatch.setattr(demo, "make_demo_model", lambda folder, **_: save_model(folder))
    folder = tmp_path / "run"
    demo._make_model(folder, 0, told.append)
    weights = folder / "model" / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    demo._make_model(folder, 0, told.append)
    assert any("model.safetensors is damaged or was changed; making it again" in t for t in told)
    whole[-1] ^= 1
    assert weights.read_bytes() == whole
    (tmp_path / "mine" / "model").mkdir(parents=True)
    with pytest.raises(InputError, match="mine: holds other files, such as model"):
        demo.run_demo(tmp_path / "mine", told.append)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["model"]
