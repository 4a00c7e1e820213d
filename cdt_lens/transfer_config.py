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

from cdt_lens.errors import InputError
from cdt_lens.options import SCOPES, TrainingOptions
from cdt_lens.prompts import did_you_mean


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


@dataclass(frozen=True)
class ProxySettings:
    """The proxy stage. checkpoint: a model that has done it already; examples: of the source."""

    checkpoint: str | None = None
    examples: int | None = None
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(epochs=2))


@dataclass(frozen=True)
class DiscoverySettings:
    """How the circuit is found and its faithfulness measured; see `runs.Settings`."""

    examples: int = 48
    baseline_examples: int | None = None
    k: int | None = None
    fraction: float | None = None
    by: Literal["magnitude", "signed"] = "magnitude"
    rules: str = "stable"
    positions: Literal["answer", "pooled", "right", "left"] = "answer"
    faithfulness_examples: int = 24
    draws: int = 3
    batch_size: int = 16
    rows: int | None = None


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
        filled[name] = _checked(kind, _with_training(kind, section), f"{where}: [{name}]")
    return _checked(TransferConfig, filled, where)


def _with_training(kind: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the section's own, and the rest as its training options."""
    own = {f.name for f in fields(kind)}
    if "training" not in own:
        return dict(section)
    options = {f.name for f in fields(TrainingOptions)}
    given = dict(section.get("training", {}))
    given |= {key: value for key, value in section.items() if key in options}
    kept = {k: v for k, v in section.items() if k not in options and k != "training"}
    return kept | ({"training": given} if given else {})


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
