"""Figures of fine-tuning and transfer as Vega-Lite specifications.

1. A scope has the same colour and marker in every figure and panel; no two scopes share a marker.
2. Every seed is a small mark, and the mean over seeds is a large one. A difference smaller than the
   scatter of the small ones means nothing.
3. The untouched checkpoint is drawn wherever a scope is, because training must beat it.
4. The figure of the measures has parameters: the `measure` shown, the `hidden` scopes, and whether
   the `seeds` are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.display import INK, MUTED, POSITIVE, Figure
from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.adapt_result import AdaptResult
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.models.heads import all_heads
from cdt_lens.tasks.evaluate import Evaluation
from cdt_lens.viz import spec
from cdt_lens.viz.spec import DASHES, PAPER, Spec, field, layer, looks, name, rule, tips
from cdt_lens.viz.training_tables import MEASURES, runs_of, untouched
from cdt_lens.viz.words import limits, score

# Colour and marker of each scope; the controls have the colours of the faithfulness curve.
_LOOKS = {
    "decision": (POSITIVE, "circle"),
    "near-zero": ("#d9822b", "square"),
    "random": ("#8a5a00", "triangle-up"),
    "random-per-layer": ("#3f7a52", "triangle-down"),
    "norms": ("#7a4988", "diamond"),
    "full": (INK, "cross"),
    "lora": ("#12808f", spec.CROSS),
}
_OTHER_COLOURS = ("#a03b6d", "#5b7083", "#6b8e23", "#444444")
_OTHER_MARKERS = ("triangle-left", "triangle-right", spec.PENTAGON, spec.HOURGLASS)
_LINES = {
    "target_accuracy": ("target accuracy", POSITIVE, "circle"),
    "target_macro_f1": ("target macro-F1", "#12808f", "diamond"),
    "source_accuracy": ("source accuracy", "#8a5a00", "square"),
    "target_loss": ("target loss", POSITIVE, "circle"),
    "train_loss": ("training loss", INK, "triangle-up"),
}
_KEPT = {"shape": spec.STAR, "filled": True, "fill": PAPER, "stroke": INK, "size": 170}
_WHEN = ("before", "after")
_SEED = {"size": 22, "opacity": 0.7, "filled": True}
_MEAN = {"size": 90, "opacity": 1, "filled": True}


def learning_curve(result: FineTuneResult) -> Figure:
    """Draw accuracy (top) and loss (bottom, in nats) on validation data over the training steps.

    Step 0 is the model before training. The star marks the evaluation whose weights are kept.
    Source accuracy is left out if there was no source task.

    Args:
        result: The fine-tuning run.
    """
    columns, apart = list(_LINES), dict.fromkeys(("color", "shape", "strokeDash"), "independent")
    upper = _history(result, columns[:3], "accuracy, macro-F1")
    lower = _history(result, columns[3:], "loss (nats)")
    before, after = (score(float(row["target_accuracy"])) for row in (result.before, result.after))
    return spec.figure(
        f"Learning curve: {result.scope}",
        f"Two line charts over {len(result.history)} evaluations: target accuracy goes from "
        f"{before} to {after} at epoch {result.best_epoch}, whose weights are kept.",
        {"vconcat": [upper, lower], "resolve": {"scale": apart}},
        notes=[f"The star marks epoch {result.best_epoch}, whose weights are kept."],
        width=400,
    )


@checked_arguments
def before_and_after(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> Figure:
    """Draw accuracies before and after training, each with its 95 % interval and in numbers.

    Args:
        before: The evaluation of the untrained model by name, such as that of the language.
        after: The evaluations of the trained model, with the same names.

    Returns:
        The figure; accuracies are from 0 to 1.

    Raises:
        InputError: The names differ, or there are none.
    """
    if not before or set(before) != set(after):
        raise InputError(
            f"before_and_after: before has {', '.join(before) or 'nothing'}, after has "
            f"{', '.join(after) or 'nothing'}; give both the same names"
        )
    return _accuracies([
        (place, when, found[place].accuracy, *found[place].intervals["accuracy"])
        for place in before
        for when, found in zip(_WHEN, (before, after), strict=True)
    ])  # fmt: skip


def adaptation(result: AdaptResult) -> Figure:
    """Draw the accuracy of both languages on test rows before and after, with 95 % intervals.

    Args:
        result: The adaptation.
    """
    rows: list[Any] = result.languages.to_dict("records")
    return _accuracies([
        (f"{row['language']} language", when, row[when], row[f"{when}_low"], row[f"{when}_high"])
        for row in rows
        for when in _WHEN
    ])  # fmt: skip


def trained_heads(result: FineTuneResult) -> Figure:
    """Draw the heads whose slices were trained, layers down and heads across.

    Trained heads are dark. Heads with a cross were not selected but share a trained K/V slice.

    Args:
        result: The fine-tuning run.
    """
    trained, shared = len(result.heads), len(result.siblings)
    states = f"trained ({trained})", f"shares a K/V slice ({shared})", "not trained"
    rows = []
    for head in all_heads(result.n_layers, result.n_heads):
        state = states[0 if head in result.heads else 1 if head in result.siblings else 2]
        rows.append({"layer": head.layer, "head": head.head, "cell": head, "state": state})
    colour = name("state", legend={"columns": 3}, **looks(states, (POSITIVE, "#a9c6e3", "#ececec")))
    crosses = [row for row in rows if row["state"] == states[1]]
    mark = layer("point", crosses, "", {"shape": spec.CROSS, "filled": True, "fill": INK})
    told = tips(cell="head", state="state")
    return spec.figure(
        f"Trained heads: {result.scope}",
        f"Map of {result.n_layers} layers by {result.n_heads} heads: {trained} trained, "
        f"{shared} that share a trained key or value slice.",
        spec.head_map(rows, (result.n_layers, result.n_heads), colour, told, mark),
    )


def trade_off(result: TransferResult) -> Figure:
    """Draw target accuracy (up) against retention (across) on test data, one panel per target.

    Up and to the right is better. The star is the untouched proxy checkpoint, whose retention is 1
    by definition.

    Args:
        result: The transfer.
    """
    axes = {
        axis: field(key, MEASURES[key].heading, scale={"zero": False})
        for axis, key in (("x", "retention"), ("y", "accuracy"))
    }
    means = {axis: on | {"aggregate": "mean"} for axis, on in axes.items()}
    told = tips(
        target="target", scope="scope", seed="seed", accuracy="accuracy", retention="retention"
    )
    run, before = f"{_RUN} && isValid(datum.retention)", "datum.part === 'untouched'"
    level = {"color": MUTED, "strokeDash": DASHES[1]}
    body = _panels(result, 220, 190, [
        rule("x", 1, strokeDash=DASHES[1]),
        layer("rule", None, before, level, y=axes["y"]),
        layer("point", None, before, _KEPT, **axes, tooltip=told),
        layer("point", None, run, _SEED, **axes, **_scopes(result), tooltip=told),
        layer("point", None, run, _MEAN, **means, **_scopes(result)),
    ])  # fmt: skip
    return spec.figure(
        "Target accuracy against retention: up and to the right is better",
        f"Scatter plots, one for each of {len(result.targets)} target languages, of target "
        f"accuracy against retention for {', '.join(result.scopes)}; the tables hold the numbers.",
        body,
        notes=["Star, dashed: the untouched checkpoint. Large marks: the mean over seeds."],
        width=560,
    )


def measures(result: TransferResult) -> Figure:
    """Draw one measure on test data by scope, one panel per target, with seeds and mean.

    The line through a mean is one standard deviation over seeds each way. Dotted: chance, always
    the commonest label. Dashed: the untouched proxy checkpoint. The parameter `measure` names the
    column of `result.cells` that is shown, first the accuracy.

    Args:
        result: The transfer.
    """
    x = field("value", None, scale={"zero": False})
    y = name("scope", scale={"domain": list(result.scopes)}, axis={"ticks": False, "grid": True})
    told = tips(target="target", scope="scope", seed="seed", value="value")
    mean = {"x": x | {"aggregate": "mean"}, "y": y}
    run = "datum.part === 'run' && isValid(datum.value) && indexof(hidden, datum.place) < 0"
    levels = (("untouched", DASHES[1]), ("chance", DASHES[3]))
    body = _panels(result, 200, 26 * max(len(result.scopes), 1), [
        *(layer("rule", None, f"datum.part === '{part}'", {"color": MUTED, "strokeDash": dash}, x=x,
                tooltip=told) for part, dash in levels),
        layer("errorbar", None, run, {"extent": "stdev"}, x=x, y=y, color=_scopes(result)["color"]),
        layer("point", None, f"{run} && seeds", {**_SEED, "yOffset": 8}, x=x, y=y, tooltip=told,
              **_scopes(result)),
        layer("point", None, run, _MEAN, **mean, **_scopes(result)),
    ])  # fmt: skip
    headings = {
        k: f"{m.heading[:1].upper()}{m.heading[1:]} of each scope" for k, m in MEASURES.items()
    }
    body["transform"] = [{"calculate": "datum[measure]", "as": "value"}]
    start = {"measure": "accuracy", "hidden": [], "seeds": True, "headings": headings}
    body["params"] = [{"name": key, "value": value} for key, value in start.items()]
    drawn = spec.figure(
        headings["accuracy"],
        f"Dot plots, one for each of {len(result.targets)} target languages, of the target "
        f"accuracy of {', '.join(result.scopes)}, beside chance.",
        body,
        notes=[
            "Dashed: the untouched checkpoint. Dotted: chance. Large marks: the mean over seeds "
            "\u00b1 1 standard deviation."
        ],
        width=560,
    )
    drawn.spec["title"]["text"] = {"expr": "headings[measure]"}
    return drawn


def measures_of(result: TransferResult) -> dict[str, str]:
    """Return the columns of the cells that have values, with their headings."""
    known = set(result.cells.columns[result.cells.notna().any()]) if len(result.cells) else set()
    return {key: measure.heading for key, measure in MEASURES.items() if key in known}


def _accuracies(measured: Sequence[tuple[Any, ...]]) -> Figure:
    """Draw rows of place, `before` or `after`, accuracy, and the ends of its interval."""
    keys = ("place", "when", "accuracy", "low", "high")
    rows = [
        {**dict(zip(keys, row, strict=True)), "words": f"{score(row[2])} {limits(row[3:], '.3f')}"}
        for row in measured
    ]
    x = field("accuracy", "accuracy", scale={"domain": [0, 1]})
    places = list(dict.fromkeys(row["place"] for row in rows))
    at = {
        "y": name("place", scale={"domain": places}, axis={"ticks": False}),
        "yOffset": name("when", scale={"domain": list(_WHEN)}),
    }
    colour, shape = (
        name("when", legend={"title": None, "columns": 2}, **looks(_WHEN, values))
        for values in ((MUTED, POSITIVE), ("square", "circle"))
    )
    told = tips(place="language", when="when", words="accuracy")
    # The numbers stand on the side of the point where there is more room.
    sides = (("< 0.5", "high", {"align": "left", "dx": 8}),
             (">= 0.5", "low", {"align": "right", "dx": -8}))  # fmt: skip
    body = {
        "width": 380, "height": {"step": 24}, "data": {"values": rows}, "encoding": at,
        "layer": [
            layer("rule", look={"strokeWidth": 2}, x=x | {"field": "low"}, x2={"field": "high"},
                  color=colour),
            layer("point", look=_MEAN, x=x, color=colour, shape=shape, tooltip=told),
            *(layer("text", None, f"datum.accuracy {where}", look, x=x | {"field": end},
                    text=name("words")) for where, end, look in sides),
        ],
    }  # fmt: skip
    numbers = "; ".join(f"{row['place']} {row['when']} {row['words']}" for row in rows)
    return spec.figure(
        "Accuracy before and after, with 95 % intervals",
        f"Dot plot of accuracies with 95 % intervals: {numbers}.",
        body,
    )


def _history(result: FineTuneResult, columns: Sequence[str], title: str) -> Spec:
    """Draw columns of the history over the steps, those that were measured."""
    records: list[Any] = result.history.to_dict("records")
    rows = [
        {"step": row["step"], "epoch": row["epoch"], "value": row[key], "line": _LINES[key][0]}
        for key in columns
        for row in records
        if np.isfinite(row[key])
    ]
    first = _LINES[columns[0]][0]
    kept = [r for r in rows if (r["epoch"], r["line"]) == (result.best_epoch, first)]
    names, colours, shapes = zip(*(_LINES[key] for key in columns), strict=True)
    legend = {"title": None, "columns": 3}
    on = {
        channel: name("line", legend=legend, **looks(names, values))
        for channel, values in (("color", colours), ("strokeDash", DASHES), ("shape", shapes))
    }
    on |= {"x": field("step", "optimiser step"), "y": field("value", title, scale={"zero": False})}
    shape = on.pop("shape")
    at = {axis: on[axis] for axis in ("x", "y")}
    told = tips(line="line", step="step", value="value")
    dots = {"color": on["color"], "shape": shape, "tooltip": told}
    return {
        "width": 340, "height": 170,
        "layer": [
            layer("line", rows, "", {"strokeWidth": 2}, **on),
            layer("point", rows, "", {"size": 36, "filled": True}, **at, **dots),
            layer("point", kept, "", _KEPT, **at),
        ],
    }  # fmt: skip


_RUN = "datum.part === 'run' && isValid(datum.accuracy)"


def _panels(result: TransferResult, width: int, height: int, layers: list[Spec]) -> Spec:
    """Return a panel for each target, at most three in a row, on the same scales."""
    count = len(result.targets)
    empty = layer("text", None, "datum.part === 'empty'", {"color": MUTED},
                  text={"value": "no finished run"}, y={"value": 12})  # fmt: skip
    return {
        "data": {"values": [row for target in result.targets for row in _rows(result, target)]},
        "facet": name("panel", header={"title": None, "labelLimit": width},
                      sort={"field": "order", "op": "min"}),
        "columns": 2 if count == 4 else min(max(count, 1), 3),
        "spec": {"width": width, "height": height, "layer": [*layers, empty]},
    }  # fmt: skip


def _rows(result: TransferResult, target: str) -> list[Spec]:
    """Return the runs on one target, the untouched checkpoint, and chance."""
    before = {key: untouched(result, target, key) for key in MEASURES} | {"retention": 1.0}
    rows: list[Spec] = [
        {"part": "chance", "scope": "chance", "accuracy": result.chance.get(target)},
        {"part": "untouched", "scope": "untouched checkpoint", **before},
    ]
    keys = ["seed", *MEASURES]
    for place, scope in enumerate(result.scopes):
        runs: list[Any] = runs_of(result, target, scope)[keys].to_dict("records")
        rows += [{"part": "run", "scope": scope, "place": place, **run} for run in runs]
    done = any(row["part"] == "run" and np.isfinite(row["accuracy"]) for row in rows)
    rows += [] if done else [{"part": "empty"}]
    # The name of a pseudo-language, such as "0.3", would read as a tick label.
    title = f"target {target}" if target.replace(".", "").isdigit() else target
    order = result.targets.index(target)
    return [{"target": target, "panel": title, "order": order, **row} for row in rows]


def _scopes(result: TransferResult) -> Spec:
    drawn = [_look(result, index) for index in range(len(result.scopes))]
    colours, shapes = zip(*drawn, strict=True) if drawn else ((), ())
    legend = {"title": None, "columns": 4}
    return {
        channel: name("scope", legend=legend, **looks(result.scopes, values))
        for channel, values in (("color", colours), ("shape", shapes))
    }


def _look(result: TransferResult, index: int) -> tuple[str, str]:
    """Return colour and marker of a scope; an unknown scope takes the next unused ones."""
    scope = result.scopes[index]
    unknown = [other for other in result.scopes if other not in _LOOKS]
    if scope in _LOOKS:
        return _LOOKS[scope]
    # The fifth scope has the first colour again, with the second marker: 16 looks in all.
    turn, place = divmod(unknown.index(scope), len(_OTHER_COLOURS))
    return _OTHER_COLOURS[place], _OTHER_MARKERS[(place + turn) % len(_OTHER_MARKERS)]
