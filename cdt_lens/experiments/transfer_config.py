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
[transfer.variants.NAME]        # a scope with other heads or other training options
[related]                       # another task, whose accuracy shows what else was forgotten
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cdt_lens.core.checked import Checked, check_names, checked_arguments, from_values
from cdt_lens.core.choices import HEAD_SCOPES, Backend, HeadChoice, Protocol, Scope
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.core.kept import file_name
from cdt_lens.experiments.settings import (
    CircuitSettings,
    DataSettings,
    ModelSettings,
    Settings,
    check_files,
    values_of,
)
from cdt_lens.finetuning.options import SCOPES, TrainingOptions

# A file holds them as a list.
Names = Annotated[tuple[str, ...], Field(strict=False)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
Rate = Annotated[float, Field(gt=0)]
Rates = Annotated[tuple[Rate, ...], Field(strict=False)]


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
        check_files(self.name, self.files)
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
        search: Factors of the learning rate that are tried for one epoch on at most 200 examples.
            The one with the lowest validation loss is taken. None tries none.
        training: The training options.
    """

    checkpoint: str | None = None
    examples: Annotated[int | None, Field(ge=1)] = None
    search: Rates | None = None
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(epochs=2))


@dataclass(frozen=True, kw_only=True)
class DiscoverySettings(CircuitSettings):
    """[discovery]: how the circuit is found, and how its faithfulness is measured.

    Args:
        faithfulness_examples: Number of validation examples to measure faithfulness on.
        draws: Number of random circuits of each kind and size.
    """

    faithfulness_examples: Annotated[int, Field(ge=1)] = 24
    draws: Annotated[int, Field(ge=1)] = 3


@dataclass(frozen=True, kw_only=True)
class Variant(Checked):
    """[transfer.variants.NAME]: a scope with other heads or other training options.

    Args:
        scope: The scope.
        k: Number of heads; None takes as many as the circuit has.
        fraction: Number of heads as a share of all, in place of `k`.
        heads: How the heads of `decision` are chosen: "circuit" takes the first of the circuit's
            ranking, "gradient" those with the largest gradient of the target's training loss,
            "both" those for which the two together are largest (`training_signal`).
        sets: Number of random sets of heads. The runs are NAME-1, NAME-2 and so on, each with every
            seed. None draws one set with each seed.
        draw: Number of one random set, where `sets` asks for several.
        match: Name of a scope or variant. The rank of `lora` is the one whose number of trained
            parameters is nearest to it, with `lora_alpha` twice the rank.
        training: Training options by name, in place of those of [transfer].
    """

    scope: Scope
    k: Annotated[int | None, Field(ge=1)] = None
    fraction: Annotated[float | None, Field(gt=0, le=1)] = None
    heads: HeadChoice = "circuit"
    sets: Annotated[int | None, Field(ge=1)] = None
    draw: Annotated[int | None, Field(ge=0)] = None
    match: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        TrainingOptions().changed(**self.training)
        for option, value, only in (
            ("heads", self.heads != "circuit", ("decision",)),
            ("sets", self.sets is not None, ("random", "random-per-layer")),
            ("draw", self.draw is not None, ("random", "random-per-layer")),
            ("match", self.match is not None, ("lora",)),
            ("k", self.k is not None, HEAD_SCOPES),
            ("fraction", self.fraction is not None, HEAD_SCOPES),
        ):
            if value and self.scope not in only:
                raise InputError(f"{option}: for the scope {' or '.join(only)}, not {self.scope}")
        if self.k is not None and self.fraction is not None:
            raise InputError("number of heads: expected k or fraction, got both")
        if self.sets is not None and self.draw is not None:
            raise InputError("draw: sets has its own draws; give one of both")
        rank = [name for name in ("lora_rank", "lora_alpha") if name in self.training]
        if self.match is not None and rank:
            raise InputError(f"{rank[0]}: match chooses it; omit it, or omit match")
        if "seed" in self.training:
            raise InputError("seed: every run is made with each of `seeds`; omit it here")


@dataclass(frozen=True, kw_only=True)
class TransferSettings(Checked):
    """[transfer]: the runs, one for each scope or variant, target and seed.

    Args:
        scopes: What is trained in turn.
        variants: More runs by name: a scope with other heads or training options.
        seeds: Seeds of training; each draws its own training examples and random heads.
        examples: Number of training examples of each target; None takes all.
        race_epochs: Number of epochs after which the race rule chooses a scope: by the first
            evaluation from then on, see `evaluate_every`.
        learning_rates: Peak learning rates by scope; the others take that of `training`.
        search: Factors of the learning rate that are tried for every scope and variant, on the
            first target with the first seed. The one with the best validation result is taken for
            all runs. None tries none.
        text_examples: Number of test prompts of the source and the target on whose own text the
            loss of the language model is measured; None measures none.
        save_adapters: Whether the adapters of the head scopes and of `norms` are kept.
        training: The training options.
    """

    scopes: Names = ("full", "decision", "near-zero", "random", "norms", "lora")
    variants: dict[str, Variant] = field(default_factory=dict)
    seeds: Seeds = (0,)
    examples: Annotated[int | None, Field(ge=1)] = None
    race_epochs: Annotated[int, Field(ge=1)] = 1
    learning_rates: dict[str, Rate] = field(default_factory=dict)
    search: Rates | None = None
    text_examples: Annotated[int | None, Field(ge=1)] = 64
    save_adapters: bool = True
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_once("scopes", self.scopes)
        _check_once("seeds", self.seeds)
        if self.search is not None:
            _check_once("search", self.search)
        for scope in (*self.scopes, *self.learning_rates):
            if scope not in SCOPES:
                raise InputError(
                    f"scope {scope!r}: unknown{did_you_mean(scope, SCOPES)}; expected some of "
                    f"{', '.join(SCOPES)}"
                )
        _check_variants(self)
        if self.training.seed:
            seed = self.training.seed
            raise InputError(f"[transfer] has no option `seed`; write `seeds = [{seed}]`")

    @property
    def race_epoch(self) -> int:
        """The epoch whose evaluation the race rule reads."""
        every = self.training.evaluate_every
        return min(math.ceil(self.race_epochs / every) * every, self.training.epochs)

    @cached_property
    def runs(self) -> Mapping[str, Variant]:
        """What is trained, by name: the scopes, the variants, and each of their random sets."""
        found = {scope: Variant(scope=scope) for scope in self.scopes}  # type: ignore[arg-type]
        for name, variant in self.variants.items():
            if variant.sets is None:
                found[name] = variant
            for number in range(variant.sets or 0):
                found[f"{name}-{number + 1}"] = replace(variant, sets=None, draw=number)
        return found


def _check_variants(settings: TransferSettings) -> None:
    for name, variant in settings.variants.items():
        if name in SCOPES:
            raise InputError(f"variants: {name!r} is the name of a scope; give it another name")
        if variant.match is not None and variant.match not in settings.runs:
            raise InputError(
                f"variants: {name}: match={variant.match!r}: expected one of "
                f"{', '.join(settings.runs)}"
            )
        if variant.match is not None and settings.runs[variant.match].match is not None:
            raise InputError(
                f"variants: {name}: match={variant.match!r} matches another run itself; name a run "
                "without match"
            )
    if len(settings.runs) < len(settings.scopes) + sum(
        v.sets or 1 for v in settings.variants.values()
    ):
        raise InputError("variants: two of the runs have the same name; rename one of them")


@dataclass(frozen=True, kw_only=True)
class RelatedSettings(DataSettings):
    """[related]: another task that the proxy can do, to measure what else a transfer forgets.

    Args:
        name: The task, as for `Settings.task`.
        language: The language of the task.
        files: Paths by split, for the task "files".
        shots: Number of solved examples before every prompt.
        examples: Number of test examples to judge on, drawn once.
    """

    name: str
    language: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    shots: Annotated[int, Field(ge=0)] = 0
    examples: Annotated[int, Field(ge=1)] = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        check_files(self.name, self.files)


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
        related: Another task, to measure what else a transfer forgets; None measures none.
        protocol: "tuned" takes our defaults. "paper" takes those of arXiv 2601.08146 (version 1)
            for every key that is left out: the mean and the scores of 50 correctly answered
            examples apart from those of the proxy stage, 5 epochs, and 5e-5 as every rate.
    """

    backend: Backend = "bridge"
    protocol: Protocol = "tuned"
    task: TaskSettings
    proxy: ProxySettings = field(default_factory=ProxySettings)
    discovery: DiscoverySettings = field(default_factory=DiscoverySettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    related: RelatedSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend == "hooked":
            low = [name for name, run in self.transfer.runs.items() if run.scope == "lora"]
            if low:
                raise InputError(
                    f"backend='hooked': a LoRA ({', '.join(low)}) needs TransformerBridge; use "
                    "backend = 'bridge', or leave it out of scopes"
                )

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
            bare = re.fullmatch(r"[\w-]+", language, re.ASCII)
            key = language if bare else json.dumps(language, ensure_ascii=False)
            raise InputError(
                f"task files: expected [task.files.{key}] with train, valid and test, and in "
                "[task] a template and a verbalizer word for each label"
            )
        values = values_of(self, ModelSettings) | values_of(task, DataSettings)
        values |= values_of(self.discovery, CircuitSettings) | {"model": model or self.model}
        files = task.files[language] if task.name == "files" else {}
        return Settings(task=task.name, language=language, files=files, **values)

    def related_settings(self) -> Settings | None:
        """Return the settings of a run on the related task, if there is one."""
        if self.related is None:
            return None
        values = values_of(self, ModelSettings) | values_of(self.related, DataSettings)
        related = self.related
        return Settings(
            task=related.name,
            language=related.language,
            files=related.files,
            shots=related.shots,
            **values,
        )


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
    config = config_of(values, where=str(path))
    _check_ready(values.get("proxy", {}), f"{path}: [proxy]")
    return config


def _check_ready(written: Mapping[str, Any], where: str) -> None:
    """Refuse keys of a training that a ready checkpoint leaves out.

    Only a file shows which keys a person wrote: `to_dict` gives all, and a protocol fills them in.
    """
    unused = ", ".join(name for name in written if name != "checkpoint")
    if "checkpoint" in written and unused:
        raise InputError(
            f"{where}: {unused} would have no effect with checkpoint, a model that is not trained "
            "here; omit one or the other"
        )


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
    "task": TaskSettings,
    "proxy": ProxySettings,
    "discovery": DiscoverySettings,
    "transfer": TransferSettings,
    "related": RelatedSettings,
}
# The values of arXiv 2601.08146, version 1, for keys that are left out under protocol = "paper".
_PAPER: Mapping[str, Mapping[str, Any]] = {
    "proxy": {"epochs": 5, "learning_rate": 5e-5},
    "discovery": {
        "correct_only": True, "apart": 150, "examples": 50, "exact": 50, "baseline_examples": 50,
    },
    "transfer": {
        "scopes": ["full", "decision", "near-zero", "random"], "seeds": [0, 1, 2, 3], "epochs": 5,
        "learning_rate": 5e-5,
    },
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
    paper = filled.get("protocol") == "paper"
    for name, kind in _SECTIONS.items():
        section = filled.get(name, {})
        if name == "related" and filled.get(name) is None:
            continue  # `to_dict` gives None where there is none
        if not isinstance(section, Mapping):
            raise InputError(f"{where}: {name}: expected a section [{name}], got {section!r}")
        at = f"{where}: [{name}]"
        if paper:
            section = {**_left_out(_PAPER.get(name, {}), section), **section}
        if name == "transfer":
            section = _with_variants(section, at)
        if "training" in {item.name for item in fields(kind)}:
            section = _with_training(kind, section, at)
        filled[name] = from_values(kind, section, at)
    return from_values(TransferConfig, filled, where)


def _left_out(values: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a section does not set, under their name or within `training`."""
    nested = section.get("training")
    given = {*section, *(nested if isinstance(nested, Mapping) else ())}
    return {name: value for name, value in values.items() if name not in given}


def _with_variants(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Make the variants of [transfer], whose keys are those of `Variant` and training options."""
    variants = section.get("variants", {})
    if not isinstance(variants, Mapping):
        raise InputError(f"{where}: variants: expected sections [transfer.variants.NAME]")
    own = {item.name for item in fields(Variant)}
    made = {}
    for name, values in variants.items():
        at = f"{where[:-1]}.variants.{name}]"
        if not isinstance(values, Mapping):
            raise InputError(f"{at}: expected a section, got {values!r}")
        check_names(values, own | {item.name for item in fields(TrainingOptions)}, at)
        loose = {key: value for key, value in values.items() if key not in own}
        training = {**_training_in(values, at), **loose}
        given = {key: value for key, value in values.items() if key in own}
        made[name] = from_values(Variant, given | {"training": training}, at)
    return {**section, "variants": made} if variants else dict(section)


def _with_training(kind: type, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Gather the keys of a section that are training options; the rest keep their defaults."""
    own = {item.name for item in fields(kind)} - {"training"}
    options = {item.name for item in fields(TrainingOptions)}
    check_names([name for name in section if name != "training"], own | options, where)
    nested = _training_in(section, where)
    loose = {name: section[name] for name in section if name in options}
    try:
        training = kind().training.changed(**{**nested, **loose})
    except InputError as error:
        raise InputError(f"{where}: training: {error}") from error
    return {name: section[name] for name in section if name in own} | {"training": training}


def _training_in(section: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the training options that stand in a table of their own."""
    nested = section.get("training", {})
    if not isinstance(nested, Mapping):
        raise InputError(f"{where}: training: expected a section, got {nested!r}")
    return nested


def _check_once(name: str, values: Sequence[object]) -> None:
    if not values or len(set(values)) < len(values):
        raise InputError(f"{name}: expected at least one, each once; got {list(values)}")
