"""The settings of discover, compare and transfer.

Each setting has its name, type, limits, default and description here, once: the keys of `run.json`
and of a transfer's TOML file, and the options of the command line, are read from these fields. The
module imports neither torch nor TransformerLens, so that the command line starts at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cdt_lens.core.checked import Checked, from_values
from cdt_lens.core.choices import (
    DEFAULT_RULES,
    Backend,
    Direction,
    Dtype,
    Preset,
    Ranking,
    Reference,
    Slots,
)
from cdt_lens.core.errors import InputError

# The sizes of train, valid and test. A file holds them as a list.
Sizes = Annotated[tuple[int, int, int], Field(strict=False)]


@dataclass(frozen=True, kw_only=True)
class WeightSettings(Checked):
    """Which weights are loaded, and as which number type."""

    model: Annotated[str, Field(description="Hub name, Hugging Face folder or .gguf file.")]
    dtype: Annotated[Dtype, Field(description="Number type of the weights.")] = "float32"


@dataclass(frozen=True, kw_only=True)
class ModelSettings(WeightSettings):
    """Which model is loaded, and how."""

    backend: Annotated[Backend, Field(description="TransformerLens class to load it as.")] = "auto"
    device: Annotated[
        str | None,
        Field(
            description="Device, such as cuda or cpu; the default is a GPU if any. auto spreads a "
            "model over all GPUs; such a model can be scored, not trained."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DataSettings(Checked):
    """How the examples of a task are made."""

    data: Annotated[
        str | None, Field(description="Folder with the data sets; the default is the hub.")
    ] = None
    template: Annotated[
        str | None,
        Field(description=r'Prompt with the columns in braces, such as "{text}\nSentiment:".'),
    ] = None
    verbalizer: Annotated[
        dict[str, str], Field(description="The word that stands for each label.")
    ] = field(default_factory=dict)
    label_column: Annotated[str, Field(description="Column that holds the label.")] = "label"
    sizes: Annotated[
        Sizes | None, Field(description="Sizes of train, valid and test of generated data.")
    ] = None
    seed: Annotated[int, Field(ge=0, description="Seed of every random draw.")] = 0


@dataclass(frozen=True, kw_only=True)
class CircuitSettings(Checked):
    """How heads are scored and a circuit is selected."""

    examples: Annotated[
        int, Field(ge=1, description="Number of examples to score, balanced over the labels.")
    ] = 128
    exact: Annotated[
        int | None,
        Field(
            ge=1, description="Number of scored examples that get the exact sweep, too; the others "
            "get first-order scores. Default: 15 where the rules have a first-order form, and "
            "more where these scores are poor; all in small models and for other rules.",
        ),
    ] = None  # fmt: skip
    precision: Annotated[
        float | None,
        Field(
            gt=0, description="Sweep until the standard error is at most this share of the task "
            "direction (median over the largest tenth of the heads), up to all prompts.",
        ),
    ] = None  # fmt: skip
    minutes: Annotated[
        float | None, Field(gt=0, description="Sweep for this time, up to all prompts.")
    ] = None
    baseline_examples: Annotated[
        int | None,
        Field(
            ge=1, description="Number of examples to average for the baseline; default: all of "
            "the training split.",
        ),
    ] = None  # fmt: skip
    apart: Annotated[
        int | None,
        Field(
            ge=1, description="Number of training examples that are set aside for the scores and "
            "the baseline; the proxy of a transfer is not trained on them. Default: all are "
            "taken for both.",
        ),
    ] = None  # fmt: skip
    correct_only: Annotated[
        bool, Field(description="Score and average only examples that the model answers right.")
    ] = False
    k: Annotated[int | None, Field(ge=1, description="Number of heads in the circuit.")] = None
    decide: Annotated[
        bool, Field(description="Sweep on only with heads whose place in the circuit is open.")
    ] = False
    fraction: Annotated[
        float | None,
        Field(gt=0, le=1, description="Share of all heads in the circuit; default: 0.1."),
    ] = None
    by: Annotated[
        Ranking, Field(description="Rank heads by the magnitude or by the signed score.")
    ] = "signed"
    rules: Annotated[Preset, Field(description="Propagation rules.")] = DEFAULT_RULES
    positions: Annotated[
        Slots, Field(description="Positions that share one mean in the baseline.")
    ] = "answer"
    batch_size: Annotated[int, Field(ge=1, description="Number of examples per batch.")] = 16
    rows: Annotated[
        int | None,
        Field(
            ge=1, description="Number of rows (sources x examples) per pass; the default depends "
            "on the length of the prompts.",
        ),
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None and self.fraction is not None:
            raise InputError("circuit size: expected k or fraction, got both")


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings, DataSettings, CircuitSettings):
    """The settings of one run on one task in one language; all of them are kept in `run.json`."""

    task: Annotated[
        str,
        Field(
            description="nusax-senti, xnli, ioi, greater-than, gendered-pronoun, pseudo-sentiment, "
            "mib-ioi, mib-arithmetic, mib-mcqa, mib-arc, or files for files of your own."
        ),
    ] = "nusax-senti"
    language: Annotated[
        str | None,
        Field(
            description="Language, such as english or javanese; of xnli, en or fr; of "
            "mib-arithmetic, addition or subtraction; of mib-arc, easy or challenge."
        ),
    ] = None
    files: Annotated[
        dict[str, str], Field(description="Path of the file of each split, for the task files.")
    ] = field(default_factory=dict)
    split: Annotated[
        float | None,
        Field(
            gt=0, lt=1, description="Share of the training file to set aside for validation, for "
            "the task files; the same rows in every command.",
        ),
    ] = None  # fmt: skip
    pair: Annotated[
        str | None,
        Field(
            description="Column with the text of each row's counterfactual prompt, for the task "
            "files; if the template has several columns, column=pair for each that it replaces, "
            "between commas. For a task of MIB, another counterfactual than its own.",
        ),
    ] = None  # fmt: skip
    pair_label: Annotated[
        str | None,
        Field(
            description="Column with the label of the counterfactual prompt; default: the row's."
        ),
    ] = None
    baseline: Annotated[
        Reference,
        Field(
            description="Reference values of the heads: their means over the training split, their "
            "values on each prompt's counterfactual prompt, or their means over these prompts."
        ),
    ] = "mean"
    shots: Annotated[
        int, Field(ge=0, description="Number of solved examples before every prompt.")
    ] = 0
    calibrate: Annotated[
        bool, Field(description="Subtract the label prior before accuracy is measured.")
    ] = False
    direction: Annotated[
        Direction,
        Field(description="Contrast the answer with the mean or the strongest of other labels."),
    ] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.files and self.task == Settings.task:  # need not be written beside files
            object.__setattr__(self, "task", "files")
        files = {name: Path(path).resolve() for name, path in self.files.items()}
        train = files.pop("train", None)
        same = [name for name, path in files.items() if path == train]
        if same:
            raise InputError(
                f"{train}: train and {same[0]} are the same file. Give another one, or divide it "
                "into train and valid with --split 0.2"
            )
        if self.split is not None and (not self.files or "valid" in self.files):
            given = f"the file {self.files['valid']}" if self.files else f"the task {self.task}"
            raise InputError(f"split={self.split}: {given} has validation examples; omit --split")

        self._check_data()
        self._check_baseline()

    def _check_data(self) -> None:
        """Refuse options that the kind of task would not use."""
        default = {each.name: each.default for each in fields(Settings)}
        own = self.task == "files"
        unused = ("data", "sizes") if own else ("label_column", "pair_label")
        what = "files of your own" if own else f"the task {self.task!r}"
        check_files(self.task, self.files)
        for name in unused:
            if getattr(self, name) != default[name]:
                raise InputError(f"{name}={getattr(self, name)} has no effect with {what}; omit it")

    def _check_baseline(self) -> None:
        """Refuse options that the baseline would not use."""
        ignored = {
            "pair": self.pair is not None and self.baseline == "mean",
            "pair_label": self.pair_label is not None and self.pair is None,
            "baseline_examples": self.baseline_examples is not None
            and self.baseline == "counterfactual",
        }
        for name, unused in ignored.items():
            if unused:
                raise InputError(
                    f"{name}={getattr(self, name)!r} has no effect with the baseline "
                    f"{self.baseline!r} and pair={self.pair!r}. Omit it, or use --pair COLUMN "
                    "with --baseline counterfactual or counterfactual-mean"
                )

    def require_valid(self, command: str) -> None:
        """Check before anything is loaded that files of your own have validation examples.

        Args:
            command: The command that needs them.

        Raises:
            InputError: There is neither a file for valid nor a split.
        """
        if self.files and "valid" not in self.files and self.split is None:
            raise InputError(
                f"{command}: expected --valid, the file of rows to judge on, or --split 0.2, which "
                "sets aside a fifth of the training file for it"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings that `dataclasses.asdict` gave as `values`.

        Raises:
            InputError: A name that is no setting, or a value that its type does not allow.
        """
        return from_values(cls, values, "settings")


def check_files(task: str, files: Mapping[str, object]) -> None:
    """Refuse files of a person's own beside a task that has other data.

    Args:
        task: The name of the task.
        files: The files, by split or language.

    Raises:
        InputError: There are files, and the task is not "files".
    """
    if files and task != "files":
        raise InputError(
            f"task {task!r}: has data of its own; name the task files, or leave out the files "
            f"({', '.join(files)})"
        )


def values_of(settings: object, part: type) -> dict[str, Any]:
    """Return by name the values of `settings` for the fields of `part`, one of its bases."""
    return {field.name: getattr(settings, field.name) for field in fields(part)}
