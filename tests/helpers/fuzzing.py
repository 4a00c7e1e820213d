"""Files that were changed at random: each is read right, or refused in one line.

1. `seeds` writes one file of each kind that the package reads.
2. `changed` changes one: bytes of any file, or values of a JSON file. The checksums of a file of
   this package are then made right again, so that its readers see what no checksum catches.
3. `complaint` reads it and uses what was read, and says what went wrong, if anything did.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import cdt_lens
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.comparing import measured_circuits, timed_scores
from cdt_lens.comparing.comparison import Comparison, PlantedComparison
from cdt_lens.core.artifacts import content_hash, file_hash
from cdt_lens.core.errors import CdtLensError
from cdt_lens.core.kept import Kept
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.experiments import scope_choices, transfer, transfer_cells
from cdt_lens.experiments.runs import open_run
from cdt_lens.experiments.transfer_config import TransferConfig, config_of, read_config
from cdt_lens.finetuning.adapt_result import AdaptResult
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.checkpoints import Checkpoint, Log, State
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.interchange.graphs import circuit_from_graph, read_graph, write_graph
from cdt_lens.models.provenance import Provenance
from cdt_lens.tasks.rows import read_table
from cdt_lens.viz import training_tables
from cdt_lens.viz.report.training_sections import adapt_section
from helpers import sample_graph, sample_results
from helpers.places import TESTS

FILES = TESTS / "files_0_3"
KEY = {"model": "m", "data": "d"}
RESULTS: Mapping[str, tuple[str, Any]] = {
    "baseline": ("loose/baseline-mlps.json", Baseline),
    "scores": ("run/scores.json", HeadScores),
    "circuit": ("run/circuit.json", Circuit),
    "graph": ("run/graph.json", Circuit),
    "curve": ("run/faithfulness.json", FaithfulnessCurve),
    "adapter": ("tuned/adapter.json", Adapter),
    "comparison": ("compared/comparison.json", Comparison),
    "planted": ("planted/comparison.json", PlantedComparison),
    "transfer": ("transfer/result.json", TransferResult),
}
TOML = """model = "tiny"
[task]
name = "files"
source = "english"
targets = ["near", "far"]
template = "{text} is"
verbalizer = {good = " good", bad = " bad"}
[task.files.english]
train = "train.csv"
[proxy]
epochs = 2
[discovery]
examples = 48
fraction = 0.1
[transfer]
scopes = ["decision", "norms"]
seeds = [0, 1]
learning_rates = {decision = 1e-3}
"""
ROWS = [
    ("a good meal, indeed", "good"),
    ("bad \u00e9", "bad"),
    ('"quoted"', "good"),
    ("x\ny", "bad"),
]
# What stands in place of a value: other types, other sizes, more than a reader should take.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, -1e308, float("nan"), 10**12, "", "L0H1", "x" * 70000, [],
    [1], {}, {"a": 1}, ["a"], [[1]], "../../outside", "\ud800", "\0", "M0->logits", "a0.h1",
)  # fmt: skip
# Bytes that stand in the place of others.
BYTES = (
    b"[" * 100_000, b"{\"a\":" * 100_000, b"9" * 5_000, b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\"",
    b"\n", b"1e999", b"NaN", b"]", b"}", b",", b"\r", b"<!ENTITY a 'a'>", b"= [[", b"1000000000",
)  # fmt: skip


def seeds(folder: Path) -> dict[str, Path]:
    """Write one file of each kind; its name by the kind."""
    made = {}
    for name, (source, _) in RESULTS.items():
        made[name] = folder / name / "file.json"
        made[name].parent.mkdir(parents=True)
        shutil.copy(FILES / source, made[name])
        tensors = json.loads(made[name].read_text("utf-8")).get("tensors")
        if tensors is not None:
            shutil.copy((FILES / source).with_name(tensors["file"]), made[name].parent)
    for name, write in WRITERS.items():
        suffix = name.partition(".")[2] or "json"
        made[name] = folder / name / ("run.json" if name == "run" else f"file.{suffix}")
        made[name].parent.mkdir(parents=True)
        write(made[name])
    return made


def _text(rows: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(rows, "utf-8")


def _csv(path: Path) -> None:
    quoted = ['"' + text.replace('"', '""') + f'",{label}' for text, label in ROWS]
    path.write_text("text,label\n" + "\n".join(quoted) + "\n", "utf-8")


def _config() -> TransferConfig:
    return config_of(tomllib.loads(TOML))


def _run(path: Path) -> None:
    document = json.loads((FILES / "run" / "run.json").read_text("utf-8"))
    document["settings"]["model"] = "no such folder/model"  # a whole file is refused for it
    _write_json(path, document)


def _checkpoint(path: Path) -> Checkpoint:
    return Checkpoint(path, KEY)


def _save_checkpoint(path: Path) -> None:
    masters, best = {"w": torch.ones(2, 3)}, {"w": torch.zeros(2, 3)}
    rows: list[dict[str, Any]] = [{"epoch": 0, "target_loss": 0.5}]
    _checkpoint(path).save(State(masters, best, {"w|step": torch.tensor(1.0)}, history=rows))


CELL = {"row": {"target": "near", "accuracy": 0.5, "seed": 0}, "history": [{"epoch": 0}]}
KEPT: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "cell": (transfer_cells._Finished, CELL),
    "before": (transfer_cells._Before, {"row": CELL["row"]}),
    "proxy": (transfer._Proxy, {"history": CELL["history"], "options": {"epochs": 1}}),
    "tried": (transfer_cells._Tried, {"history": CELL["history"]}),
    "tried proxy": (transfer._TriedProxy, {"loss": 0.5}),
    "circuits": (measured_circuits._Measured, {"circuits": ["L0H1", ""]}),
    "time": (timed_scores._Time, {"refused": None, "clock": {}, "seconds": 1.0, "passes": None}),
}


def _kept(name: str, path: Path) -> Kept:
    return Kept(path, f"cdt_lens.{name}", KEY, holds=KEPT[name][0])


WRITERS: dict[str, Callable[[Path], object]] = {
    "mib.json": lambda path: write_graph(sample_graph.small(), path, d_model=8),
    "mib.pt": lambda path: write_graph(sample_graph.small(), path, d_model=8),
    "mib.graphml": lambda path: write_graph(sample_graph.small(), path),
    "settings.toml": _text(TOML),
    "rows.csv": _csv,
    "rows.jsonl": _text("".join(json.dumps({"text": t, "label": w}) + "\n" for t, w in ROWS)),
    "log.jsonl": _text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n'),
    "run": _run,
    "checkpoint": _save_checkpoint,
    "adapt": lambda path: sample_results.adaptation().save(path),
    "transfer of now": lambda path: sample_results.transfer(per_example=True).save(path),
    "rules": lambda path: scope_choices.fix_rules(_config(), path, 0),
} | {
    name: lambda path, name=name: _kept(name, path).write(KEPT[name][1]) for name in KEPT
}  # fmt: skip


def read(kind: str, path: Path) -> None:
    """Read a file as the package does, and use what it holds."""
    if kind in RESULTS:
        _use(RESULTS[kind][1].load(path))
    elif kind.startswith("mib"):
        _use(circuit_from_graph(read_graph(path)))
    elif kind in KEPT:
        kept = _kept(kind, path).reuse(lambda _: None)
        assert kept is None or KEPT[kind][1].keys() <= kept.keys()
    elif kind == "checkpoint":
        state = _checkpoint(path).load()
        if state is not None:
            _checkpoint(path).check_tensors(state, {"w": torch.ones(2, 3)})
            assert state.step + 1 > state.step and state.history is not None
    else:
        OTHERS[kind](path)


def _use(result: Any) -> None:
    repr(result)
    assert result == result
    result.to_dataframe()
    result._repr_html_()
    if isinstance(result, Circuit):
        result.mask.sum()
        len(result.complement)
    if isinstance(result, HeadScores):
        result.ranking("magnitude")
    if isinstance(result, TransferResult):
        result.summary()
        training_tables.comparison_table(result)
        if result.per_example and result.scopes:
            result.differences(result.scopes[0])
    if isinstance(result, AdaptResult):
        adapt_section(result, "id", ())
    provenance = getattr(result, "provenance", None)
    assert provenance is None or (isinstance(provenance, Provenance) and provenance.key is not None)


def _read_rows(path: Path) -> None:
    list(read_table(path).rows)


OTHERS: dict[str, Callable[[Path], object]] = {
    "settings.toml": lambda path: [read_config(path).settings(name) for name in ("english",)],
    "rows.csv": _read_rows,
    "rows.jsonl": _read_rows,
    "log.jsonl": lambda path: Log(path).cut(1),
    "run": lambda path: open_run(path.parent, lambda _: None),
    "adapt": lambda path: _use(AdaptResult.load(path)),
    "transfer of now": lambda path: _use(TransferResult.load(path)),
    "rules": lambda path: scope_choices.fix_rules(_config(), path, 0),
}


def complaint(kind: str, path: Path) -> str | None:
    """What is wrong with how a file is read, or None."""
    around = set(path.parent.parent.iterdir())
    try:
        read(kind, path)
    except CdtLensError as error:
        text = str(error)
        if "\n" in text:
            return f"{kind}: refused in several lines: {text!r:.200}"
        if len(text) > 2100:
            return f"{kind}: refused in {len(text)} characters: {text:.200}"
    except Exception as error:
        return f"{kind}: {type(error).__name__}: {error!s:.300}"
    outside = set(path.parent.parent.iterdir()) - around
    return f"{kind}: wrote outside its folder: {outside}" if outside else None


def changed(path: Path, draw: random.Random) -> str:
    """Change a file; returns how."""
    if path.suffix != ".json" or draw.random() < 0.15:
        return _change_bytes(path, draw)
    document = json.loads(path.read_text("utf-8"))
    how = "; ".join(_change_value(document, draw) for _ in range(draw.choice((1, 1, 1, 2, 3))))
    tensors = list(path.parent.glob("*.safetensors"))
    if tensors and draw.random() < 0.15:
        how += "; tensors: " + _change_bytes(tensors[0], draw)
        if isinstance(document.get("tensors"), dict):
            document["tensors"]["sha256"] = file_hash(tensors[0])
    _write_json(path, document, right="sha256" in document)
    return how


def _write_json(path: Path, document: dict[str, Any], *, right: bool = True) -> None:
    """Write a document, with the right checksum if it can have one."""
    if right:
        document.pop("sha256", None)
        try:
            document["sha256"] = content_hash(document)
        except ValueError:
            document["sha256"] = "0" * 64
    path.write_text(json.dumps(document), "utf-8")


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:6]))
    inner = [found for key, item in items for found in _places(item, (*place, key))]
    return ([place] if place else []) + inner


def _change_value(document: dict[str, Any], draw: random.Random) -> str:
    place = draw.choice(_places(document) or [("new",)])
    holder: Any = document
    for key in place[:-1]:
        holder = holder[key]
    act, last = draw.choice(("set", "set", "delete", "repeat")), place[-1]
    if act == "set":
        holder[last] = copy.deepcopy(draw.choice(VALUES))
        return f"{place} = {holder[last]!r:.30}"
    if act == "delete":
        if isinstance(holder, list) or last in holder:
            del holder[last]
    elif isinstance(holder, list):
        holder.append(copy.deepcopy(holder[last]))
    else:
        holder[f"{last} again"] = copy.deepcopy(holder.get(last))
    return f"{act} {place}"


def _change_bytes(path: Path, draw: random.Random) -> str:
    whole = path.read_bytes()
    start = draw.randrange(len(whole) + 1)
    act = draw.choice(("flip", "cut", "insert", "replace", "repeat"))
    if act == "cut":
        whole = whole[:start]
    elif act == "flip" and start < len(whole):
        whole = whole[:start] + bytes([whole[start] ^ 1 << draw.randrange(8)]) + whole[start + 1 :]
    elif act == "insert":
        whole = whole[:start] + draw.choice(BYTES) + whole[start:]
    elif act == "replace":
        whole = whole[:start] + draw.choice(BYTES) + whole[start + draw.randrange(20) :]
    else:
        whole = whole[:start] + whole[start // 2 :]
    path.write_bytes(whole)
    return f"{act} at byte {start}"


def one_input(kind: str, seed: Path, folder: Path, draw: random.Random) -> str | None:
    """Change a copy of a seed and read it; what went wrong, if anything did."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seed.parent, folder / "in")
    path = folder / "in" / seed.name
    how = changed(path, draw)
    wrong = complaint(kind, path)
    return None if wrong is None else f"{wrong} ({how}; cdt_lens {cdt_lens.__version__})"
