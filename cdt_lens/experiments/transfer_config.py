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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cdt_lens.core.checked import Checked, check_names, checked_arguments, from_values
from cdt_lens.core.choices import Backend, Preset, Ranking
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.core.kept import file_name
from cdt_lens.experiments.settings import (
    CircuitSettings,
    DataSettings,
    ModelSettings,
    Settings,
    values_of,
)
from cdt_lens.finetuning.options import SCOPES, TrainingOptions

# A file holds them as a list.
Names = Annotated[tuple[str, ...], Field(strict=False)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
Rate = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class TaskSettings(DataSettings):
    """[task]: the task in its source language and in its targets.

    Args:
        name: The task, as for `Settings.task`.
        source: The proxy language.
        targets: The languages to adapt to.
        files: Paths by language and split, for the task "files".
        test_examples: Number of test examples to judge on; None takes all.
    """

    name: str
    source: str
    targets: Names
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    test_examples: Annotated[int | None, Field(ge=1)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_once("targets", self.targets)
        if self.source in self.targets:
            raise InputError(f"targets: {self.source!r} is the source; name other languages")
        names = [file_name(name).casefold() for name in (self.source, *self.targets)]
        for name in self.targets:
            if names.count(file_name(name).casefold()) > 1:
                raise InputError(
                    f"targets: {name!r} differs from another language in upper and lower case "
                    "alone, which not every disk tells apart; rename one of them"
                )


@dataclass(frozen=True, kw_only=True)
class ProxySettings(Checked):
    """[proxy]: the stage that fine-tunes the model on the source language.

    Args:
        checkpoint: A model that is fine-tuned already; the stage is then left out.
        examples: Number of training examples of the source; None takes all.
        training: The training options.
    """

    checkpoint: str | None = None
    examples: Annotated[int | None, Field(ge=1)] = None
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(epochs=2))


@dataclass(frozen=True, kw_only=True)
class DiscoverySettings(CircuitSettings):
    """[discovery]: how the circuit is found, and how its faithfulness is measured.

    Args:
        faithfulness_examples: Number of validation examples to measure faithfulness on.
        draws: Number of random circuits of each kind and size.
    """

    # Not the defaults of `discover`: heads to train may matter either way, and nothing that was
    # measured speaks against it (docs/results/adaptation.md).
    by: Ranking = "magnitude"
    rules: Preset = "stable"
    faithfulness_examples: Annotated[int, Field(ge=1)] = 24
    draws: Annotated[int, Field(ge=1)] = 3


@dataclass(frozen=True, kw_only=True)
class TransferSettings(Checked):
    """[transfer]: the runs, one for each scope, target and seed.

    Args:
        scopes: The scopes to train.
        seeds: The seeds to train each scope with.
        examples: Number of training examples of each target; None takes all.
        race_epochs: Number of epochs after which the race rule chooses a scope.
        learning_rates: Peak learning rates by scope; the others take that of `training`.
        save_adapters: Whether the adapters of the head scopes and of `norms` are kept.
        training: The training options.
    """

    scopes: Names = ("full", "decision", "near-zero", "random", "norms", "lora")
    seeds: Seeds = (0,)
    examples: Annotated[int | None, Field(ge=1)] = None
    race_epochs: Annotated[int, Field(ge=1)] = 1
    learning_rates: dict[str, Rate] = field(default_factory=dict)
    save_adapters: bool = True
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_once("scopes", self.scopes)
        _check_once("seeds", self.seeds)
        for scope in (*self.scopes, *self.learning_rates):
            if scope not in SCOPES:
                raise InputError(
                    f"scope {scope!r}: unknown{did_you_mean(scope, SCOPES)}; expected some of "
                    f"{', '.join(SCOPES)}"
                )
        if self.training.seed:
            seed = self.training.seed
            raise InputError(f"[transfer] has no option `seed`; write `seeds = [{seed}]`")


@dataclass(frozen=True, kw_only=True)
class TransferConfig(ModelSettings):
    """A whole transfer experiment.

    Args:
        model: The base model: hub name, Hugging Face folder or .gguf file.
        backend: TransformerLens class to load it as.
        device: Device, such as cuda or cpu.
        dtype: Number type of the weights.
        task: The task in its source language and in its targets.
        proxy: The stage that fine-tunes the model on the source language.
        discovery: How the circuit is found, and how its faithfulness is measured.
        transfer: The runs, one for each scope, target and seed.
    """

    backend: Backend = "bridge"
    task: TaskSettings
    proxy: ProxySettings = field(default_factory=ProxySettings)
    discovery: DiscoverySettings = field(default_factory=DiscoverySettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain nested values."""
        return asdict(self)

    def settings(self, language: str, *, model: str | None = None) -> Settings:
        """Return the settings of a discovery run on the task in one language.

        Args:
            language: The source or a target.
            model: The model of the run; None takes the base model.

        Raises:
            InputError: The task is "files", and no files are named for the language.
        """
        task = self.task
        if task.name == "files" and language not in task.files:
            raise InputError(
                f"task files: expected [task.files.{language}] with train, valid and test, and in "
                "[task] a template and a verbalizer word for each label"
            )
        values = values_of(self, ModelSettings) | values_of(task, DataSettings)
        values |= values_of(self.discovery, CircuitSettings) | {"model": model or self.model}
        files = task.files[language] if task.name == "files" else {}
        return Settings(task=task.name, language=language, files=files, **values)


@checked_arguments
def read_config(path: str | Path) -> TransferConfig:
    """Read the configuration in a TOML file.

    Args:
        path: The file; benchmarks/nusax.toml shows the keys.

    Returns:
        The settings of the experiment.

    Raises:
        InputError: The file cannot be read, is not TOML, or holds a key or value that does not
            belong; the message names the section.
    """
    path = Path(path)
    try:
        values = tomllib.loads(_bounded(path.read_text("utf-8-sig")))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error
    return config_of(values, where=str(path))


def _bounded(text: str) -> str:
    """Refuse what would keep the reader of TOML busy for minutes: the square of a key's depth."""
    deepest = max((line.count(".") for line in text.splitlines()), default=0)
    if len(text) > 1_000_000 or deepest > 1000:
        raise ValueError(
            f"{len(text)} characters, {deepest} dots in a line; expected settings of at most "
            "1000000 and 1000"
        )
    return text


_SECTIONS: Mapping[str, type] = {
    "task": TaskSettings, "proxy": ProxySettings, "discovery": DiscoverySettings,
    "transfer": TransferSettings,
}  # fmt: skip


def config_of(values: Mapping[str, Any], *, where: str = "settings") -> TransferConfig:
    """Make a configuration of nested values, such as `TransferConfig.to_dict` gives.

    Args:
        values: The keys of the file, and a mapping for each section.
        where: The file that the values are from, for error messages.

    Raises:
        InputError: A key or value that does not belong.
    """
    filled = dict(values)
    for name, kind in _SECTIONS.items():
        section = filled.get(name, {})
        if not isinstance(section, Mapping):
            raise InputError(f"{where}: {name}: expected a section [{name}], got {section!r}")
        at = f"{where}: [{name}]"
        if "training" in {item.name for item in fields(kind)}:
            section = _with_training(kind, section, at)
        filled[name] = from_values(kind, section, at)
    return from_values(TransferConfig, filled, where)


def _with_training(kind: type, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Gather the keys of a section that are training options; the rest keep their defaults."""
    own = {item.name for item in fields(kind)} - {"training"}
    options = {item.name for item in fields(TrainingOptions)}
    check_names([name for name in section if name != "training"], own | options, where)
    nested = section.get("training", {})
    if not isinstance(nested, Mapping):
        raise InputError(f"{where}: training: expected a section, got {nested!r}")
    loose = {name: section[name] for name in section if name in options}
    try:
        training = kind().training.changed(**{**nested, **loose})
    except InputError as error:
        raise InputError(f"{where}: training: {error}") from error
    return {name: section[name] for name in section if name in own} | {"training": training}


def _check_once(name: str, values: Sequence[object]) -> None:
    if not values or len(set(values)) < len(values):
        raise InputError(f"{name}: expected at least one, each once; got {list(values)}")
