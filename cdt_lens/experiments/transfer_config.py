"""The configuration of a transfer experiment: one TOML file, checked whole before anything runs.

model = "models/smollm2-135m"   # hub name, Hugging Face folder or .gguf file

[task]
name = "nusax-senti"            # or xnli, pseudo-sentiment, or files with [task.files.LANGUAGE]
source = "english"              # the proxy language
targets = ["indonesian", "javanese"]

[proxy]                         # full fine-tuning on the source: training options
[discovery]                     # of the circuit, in the proxy checkpoint
[transfer]                      # scopes, seeds, training options
[transfer.learning_rates]       # by scope
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.decomposition.rules import PRESETS
from cdt_lens.finetuning.options import SCOPES, TrainingOptions


@dataclass(frozen=True)
class TaskSettings:
    """The task in its source language and in its targets.

    files: by language, then split, for `name = "files"`; sizes: of train, valid and test where the
    data are generated; test_examples: how many test examples to judge on (None: all).
    """

    name: str
    source: str
    targets: tuple[str, ...]
    data: str | None = None
    template: str | None = None
    verbalizer: dict[str, str] = field(default_factory=dict)
    label_column: str = "label"
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    sizes: tuple[int, int, int] | None = None
    test_examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(1, test_examples=self.test_examples)
        _at_least(0, seed=self.seed)


@dataclass(frozen=True)
class ProxySettings:
    """The proxy stage. checkpoint: a model that has done it already; examples: of the source."""

    checkpoint: str | None = None
    examples: int | None = None
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(epochs=2))

    def __post_init__(self) -> None:
        _at_least(1, examples=self.examples)


@dataclass(frozen=True)
class DiscoverySettings:
    """How the circuit is found and its faithfulness measured; see `runs.Settings`."""

    examples: int = 48
    baseline_examples: int | None = None
    k: int | None = None
    fraction: float | None = None
    # Not the defaults of `discover`: heads to train may matter either way, and nothing that was
    # measured speaks against it (docs/results/adaptation.md).
    by: Literal["magnitude", "signed"] = "magnitude"
    rules: str = "stable"
    positions: Literal["answer", "pooled", "right", "left"] = "answer"
    faithfulness_examples: int = 24
    draws: int = 3
    batch_size: int = 16
    rows: int | None = None

    def __post_init__(self) -> None:
        _at_least(
            1, examples=self.examples, baseline_examples=self.baseline_examples, k=self.k,
            faithfulness_examples=self.faithfulness_examples, draws=self.draws,
            batch_size=self.batch_size, rows=self.rows,
        )  # fmt: skip
        if self.k is not None and self.fraction is not None:
            raise InputError("circuit size: expected k or fraction, got both")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise InputError(f"fraction={self.fraction}: expected more than 0 and at most 1")
        if self.rules not in PRESETS:
            raise InputError(
                f"rules={self.rules!r}: expected one of {', '.join(PRESETS)}"
                f"{did_you_mean(self.rules, PRESETS)}"
            )


@dataclass(frozen=True)
class TransferSettings:
    """Scopes x targets x seeds. examples: of each target (None: all); race_epochs: of the `race`
    rule; save_adapters: keep the adapters of the head scopes and of `norms`."""

    scopes: tuple[str, ...] = ("full", "decision", "near-zero", "random", "norms", "lora")
    seeds: tuple[int, ...] = (0,)
    examples: int | None = None
    race_epochs: int = 1
    learning_rates: dict[str, float] = field(default_factory=dict)
    save_adapters: bool = True
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        _at_least(1, examples=self.examples, race_epochs=self.race_epochs)
        for seed in self.seeds:
            _at_least(0, seeds=seed)
        wrong = {s: r for s, r in self.learning_rates.items() if not r > 0}
        if wrong:
            raise InputError(f"learning_rates: expected numbers above 0, got {wrong}")
        if self.training.seed:
            raise InputError(f"seed={self.training.seed}: expected seeds = [{self.training.seed}]")


@dataclass(frozen=True)
class TransferConfig:
    """A whole transfer experiment."""

    model: str
    task: TaskSettings
    proxy: ProxySettings = field(default_factory=ProxySettings)
    discovery: DiscoverySettings = field(default_factory=DiscoverySettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    backend: Literal["auto", "hooked", "bridge"] = "bridge"
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    def __post_init__(self) -> None:
        for scope in (*self.transfer.scopes, *self.transfer.learning_rates):
            if scope not in SCOPES:
                raise InputError(
                    f"transfer scope {scope!r}: unknown{did_you_mean(scope, SCOPES)}; expected "
                    f"some of {', '.join(SCOPES)}"
                )
        for name, values in (
            ("transfer.scopes", self.transfer.scopes),
            ("transfer.seeds", self.transfer.seeds),
            ("task.targets", self.task.targets),
        ):
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name}: expected at least one, each once; got {list(values)}")
        if self.task.source in self.task.targets:
            raise InputError(
                f"task.targets: {self.task.source!r} is the source; name other languages"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values."""
        return asdict(self)


def read_config(path: str | Path) -> TransferConfig:
    """The configuration in a TOML file.

    Raises:
        InputError: no such file, not TOML, or a key or value that does not belong; the message
            names the place.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error
    return config_of(values, where=str(path))


def config_of(values: Mapping[str, Any], *, where: str = "settings") -> TransferConfig:
    """The configuration in nested values, such as `TransferConfig.to_dict` gives.

    Raises:
        InputError: a key or value that does not belong.
    """
    sections = {"task": TaskSettings, "proxy": ProxySettings, "discovery": DiscoverySettings}
    sections["transfer"] = TransferSettings
    filled = dict(values)
    for name, kind in sections.items():
        section = filled.get(name, {})
        if not isinstance(section, Mapping):
            raise InputError(f"{where}: {name}: expected a section [{name}], got {section!r}")
        place = f"{where}: [{name}]"
        filled[name] = _checked(kind, _with_training(kind, section, place), place)
    return _checked(TransferConfig, filled, where)


def _with_training(kind: Any, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys of the section's own, and the rest as its training options."""
    own = {f.name for f in fields(kind)}
    if "training" not in own:
        return dict(section)
    options = {f.name for f in fields(TrainingOptions)}
    nested = section.get("training", {})
    if not isinstance(nested, Mapping):
        raise InputError(f"{where}: training: expected a section, got {nested!r}")
    # What is not given keeps the section's own default.
    given = asdict(kind().training) | dict(nested)
    for name in nested:
        TrainingOptions().changed(**{name: nested[name]})
    given |= {key: value for key, value in section.items() if key in options}
    kept = {k: v for k, v in section.items() if k not in options and k != "training"}
    return kept | {"training": given}


def _at_least(low: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < low:
            raise InputError(f"{name}={value}: expected at least {low}")


def _checked(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    known = {f.name for f in fields(kind)}
    if "training" in known:
        known |= {f.name for f in fields(TrainingOptions)}
    for key in values:
        if key not in known:
            raise InputError(
                f"{where}: unknown key {key!r}{did_you_mean(key, known)}; the keys are "
                f"{', '.join(sorted(known - {'training'}))}"
            )
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in (".".join(map(str, first["loc"])),) if part)
        if first["type"] == "value_error":  # one of ours, from a __post_init__
            raise InputError(f"{where}: {place}{first['ctx']['error']}") from error
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise InputError(f"{where}: {place}{first['msg']}{got}") from error
