"""Figures of scores, circuits and faithfulness as Vega-Lite specifications.

1. Blue is positive (pushes towards the gold label) and red is negative, in every figure.
2. No figure relies on colour alone, so that a grey print can be read: negative cells carry a dash,
   negative bars are pale, lines differ in dash, circuit heads are outlined.
3. The map and the curve have a parameter `kept`, the number of heads that a page outlines in the
   map and marks on the curve, and the map a parameter `pointed`, the name of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.display import INK, MUTED, NEGATIVE, POSITIVE, Figure
from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.scoring.agreement import MethodAgreement
from cdt_lens.viz import spec
from cdt_lens.viz.spec import DASHES, POINTED, Spec, as_array, field, layer, looks, name, rule, tips
from cdt_lens.viz.tables import Scored
from cdt_lens.viz.words import control_name, empty_run, median, metric_name

UNIT = "logits (+ = towards the gold label)"
# The marks of cells.
_NOTES = {"negative": "stroke", "not scored": spec.CROSS, "0 not excluded": spec.DOT}
# Cells below this share of the colour range look white, so that a dash there would be noise.
_DASH_FROM = 0.1
# Circuit, its complement, and the random controls.
_LINES = tuple(
    zip((POSITIVE, INK, "#8a5a00", "#3f7a52", "#7a4988"), (DASHES[i] for i in (0, 3, 1, 2, 4)),
        strict=True)
)  # fmt: skip


def heatmap(
    scores: HeadScores | Scored,
    *,
    circuit: Circuit | None = None,
    ranking: Sequence[Head] = (),
    title: str | None = None,
    limit: float | None = None,
) -> Figure:
    """Draw the score of every head, layers down and heads across.

    Blue pushes towards the gold label, red (with a dash) away from it. Heads without a score are
    grey with a cross. Those whose 95 % interval does not exclude 0 have a dot.

    Args:
        scores: The scores, in logits.
        circuit: The circuit whose heads are outlined.
        ranking: The heads in the order in which circuits grow, for the parameter `kept`.
        title: The title; by default it names the method.
        limit: The magnitude at which the colours end, in logits; by default the largest one.

    Raises:
        InputError: `circuit` belongs to a model of another shape, or `limit` is not positive.
    """
    scores = scores if isinstance(scores, Scored) else Scored.of(scores)
    values = as_array(scores.values)
    _check_map(circuit, limit, *values.shape)
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    end = limit or largest or 1.0
    outlined = circuit.heads if circuit is not None else ()
    place = {head: rank for rank, head in enumerate(ranking)}
    rows = [
        {
            "layer": head.layer, "head": head.head, "cell": head, "score": scores.at(head)[0],
            "interval": scores.interval(head), "circuit": head in outlined,
            "rank": place.get(head, values.size),
        }
        for head in all_heads(*values.shape)
    ]  # fmt: skip
    missing = {"test": "datum.score === null", "value": spec.EMPTY}
    bar = {"orient": "right", "gradientLength": 220, "titleOrient": "right", "format": "~g"}
    colour = field("score", UNIT, scale=spec.diverging(end), legend=bar, condition=missing)
    frame = {"filled": False, "stroke": INK, "strokeWidth": 2}
    body = spec.head_map(
        rows, values.shape, colour,
        tips(cell="head", score="score (logits)", interval="95 % interval"),
        _notes(scores, values, end),
        layer("rect", None, "kept < 0 ? datum.circuit : datum.rank < kept", frame),
        layer("rect", None, "datum.cell === pointed",
              {**frame, "stroke": POINTED, "strokeWidth": 3.5}),
    )  # fmt: skip
    body["params"] = [{"name": "kept", "value": -1}, {"name": "pointed", "value": ""}]
    return spec.figure(
        title or f"Score of every head: {scores.method}",
        f"Heat map of {values.shape[0]} layers by {values.shape[1]} heads; the largest magnitude "
        f"is {largest:.3g} logits; {len(outlined)} heads are outlined.",
        body,
        notes=[f"Outlined: the {len(outlined)} heads of the circuit."] if outlined else (),
    )


def curve(result: FaithfulnessCurve) -> Figure:
    """Draw faithfulness f against the share of heads kept, beside the random controls.

    f = 1 is the full model, f = 0 the empty run, which the title names. The bars are 95 % intervals
    over prompts. Sizes that keep no head are left out. The band of a control spans its 5th to 95th
    percentile around the median. The line of the knocked-out circuit should fall as f rises.

    Args:
        result: The curve.
    """
    low, high = result.interval()
    areas = f"mean over the sizes (CPR) {result.cpr:.2f}, distance from 1 (CMD) {result.cmd:.2f}"
    names = [f"circuit: {areas}", "circuit knocked out, the rest kept"]
    rows = _line(result, names[0], result.faithfulness, low, high)
    others, bands = _line(result, names[1], result.completeness), []
    for control, draws in result.random.items():
        if not len(draws):
            continue
        cpr, cmd = (median(of[control]) for of in (result.random_cpr, result.random_cmd))
        names.append(f"{control_name(control)}, median and 5-95 %: CPR {cpr}, CMD {cmd}")
        below, middle, above = np.quantile(as_array(draws), (0.05, 0.5, 0.95), axis=0)
        bands += _line(result, names[-1], middle, below, above)
    colours, dashes = zip(*(_LINES[i % len(_LINES)] for i in range(len(names))), strict=True)
    legend = {
        "title": None, "columns": 1, "symbolType": "stroke", "symbolOpacity": 1,
        "labelExpr": spec.WRAPPED,
    }  # fmt: skip
    colour = name("line", legend=legend, **looks(names, colours))
    dash = name("line", legend=legend, **looks(names, dashes))
    f = field("f", "faithfulness f", scale={"zero": False})
    ends = {"y": f | {"field": "low"}, "y2": {"field": "high"}}
    told = tips(heads="heads", f="f", low="95 % from", high="to", line="line")
    marked = {"size": 260, "stroke": POINTED, "strokeWidth": 3, "filled": False}
    body: Spec = {
        "width": 500, "height": 300, "encoding": {"x": spec.share()},
        "params": [
            {"name": "kept", "value": -1},
            # A letter has about 6 pixels.
            {"name": "letters", "expr": "max(20, floor(width / 6))"},
        ],
        "layer": [
            *_levels(f, "all heads" if result.empty_run == "heads" else "everything"),
            layer("area", bands, "", {"opacity": 0.14}, **ends, color=colour),
            layer("line", bands, "", {"strokeWidth": 1.6}, y=f, color=colour, strokeDash=dash),
            layer("line", [*rows, *others], "", {"strokeWidth": 2, "point": {"size": 36}}, y=f,
                  color=colour, strokeDash=dash, tooltip=told),
            layer("rule", rows, "isValid(datum.low)", {"color": POSITIVE}, **ends),
            layer("point", rows, "datum.heads === kept", marked, y=f),
        ],
    }  # fmt: skip
    return spec.figure(
        f"Faithfulness of growing circuits ({metric_name(result.metric)}; "
        f"{empty_run(result.empty_run)})",
        f"Line chart of faithfulness for circuits of {min(result.sizes)} to {max(result.sizes)} "
        f"heads against {len(names) - 2} random controls; {areas}; "
        f"{empty_run(result.empty_run)}.",
        body,
        width=560,
    )


@checked_arguments
def overview(scores: HeadScores, circuit: Circuit, result: FaithfulnessCurve) -> Figure:
    """Draw the map of the scores with a circuit, and beside it the faithfulness of its ranking.

    The figure is about 700 pixels wide, for a page or a slide.

    Args:
        scores: The scores.
        circuit: The circuit whose heads are outlined.
        result: The curve.

    Returns:
        The figure. Its parts are those of `HeadScores.heatmap` and `FaithfulnessCurve.plot`.

    Raises:
        InputError: `circuit` belongs to a model of another shape.
    """
    left, right = heatmap(scores, circuit=circuit), curve(result)
    height, widths = 300, (200, 290)
    named = f"Score of every head, {len(circuit)} outlined"
    panels = [
        spec.panel(left, named, widths[0], height),
        spec.panel(right, f"Faithfulness ({empty_run(result.empty_run)})", widths[1], height),
    ]
    params = {"kept": -1, "pointed": "", "letters": widths[1] // 6}
    apart = dict.fromkeys(("color", "shape", "strokeDash"), "independent")
    body = {
        "hconcat": panels, "spacing": 30, "resolve": {"scale": apart},
        "params": [{"name": key, "value": value} for key, value in params.items()],
    }  # fmt: skip
    words = f"{left.description} {right.description}"
    return spec.figure("Scores of the heads and faithfulness of circuits", words, body, width=700)


def agreement(result: MethodAgreement) -> Figure:
    """Draw the scores of a method (up) against the reference (across), one point for each head.

    Both axes are in logits, positive towards the gold label. On the dashed line the two agree in
    value. Heads that one side did not score are left out.

    Args:
        result: The agreement of a method with its reference.

    Raises:
        InputError: The two sets of scores belong to models of different shapes.
    """
    scores, reference = result.scores, result.reference
    across, up = as_array(reference.values), as_array(scores.values)
    if across.shape != up.shape:
        raise InputError(
            f"agreement: expected scores of one shape, got {scores.method} {up.shape} and "
            f"{reference.method} {across.shape}; score both on the same model"
        )
    pairs = zip(all_heads(*up.shape), across.flat, up.flat, strict=True)
    rows = [{"cell": h, "x": x, "y": y} for h, x, y in pairs if np.isfinite(x + y)]
    span = max((abs(row[axis]) for row in rows for axis in "xy"), default=0.0) or 1.0
    named: list[Spec] = []
    for row in sorted(rows, key=lambda row: -abs(row["x"]) - abs(row["y"]))[:8]:
        # A name that would cover another name is left out.
        if all(max(abs(row[axis] - other[axis]) for axis in "xy") > 0.12 * span for other in named):
            named.append(row)
    ends = [{"x": end, "y": end} for end in (min((r["x"] for r in rows), default=0.0), span)]
    axes = {
        "x": field("x", f"{reference.method}, {UNIT}"),
        "y": field("y", f"{scores.method}, {UNIT}"),
    }
    numbers = f"Spearman {result.spearman:.2f}, Pearson {result.pearson:.2f}"
    dots = {"color": POSITIVE, "opacity": 0.65, "size": 34}
    told = tips(cell="head", y=scores.method, x=reference.method)
    body = {
        "width": 400, "height": 360, "encoding": axes, "data": {"values": rows},
        "layer": [
            layer("line", ends, "", {"color": MUTED, "strokeDash": DASHES[1]}),
            layer("circle", None, "", dots, tooltip=told),
            layer("text", named, "", {"dx": 5, "dy": -6, "align": "left"}, text=name("cell")),
        ],
    }  # fmt: skip
    return spec.figure(
        f"{scores.method} against {reference.method}: {numbers}",
        f"Scatter plot of {len(rows)} heads: {numbers}.",
        body,
        notes=["On the dashed line both scores are equal."],
    )


def bars(scores: HeadScores, k: int = 20) -> Figure:
    """Draw the top heads as bars with one standard error each way.

    Scores are in logits, positive towards the gold label; negative bars are red and pale.

    Args:
        scores: The scores.
        k: The number of heads; all heads if fewer have a score.

    Raises:
        InputError: `k` is not positive, or no head has a score.
    """
    scored = int(scores.values.isfinite().sum())
    if k < 1 or not scored:
        raise InputError(f"bars: expected k of at least 1 and scores, got k={k}, {scored} scores")
    rows = []
    for head in scores.top(min(k, scored)):
        value, error = Scored.of(scores).at(head)
        rows.append({"cell": head, "score": value, "low": value - error, "high": value + error})
    negative, x = {"test": "datum.score < 0"}, field("score", UNIT)
    paint: Spec = {
        "color": {"condition": {**negative, "value": NEGATIVE}, "value": POSITIVE},
        "fillOpacity": {"condition": {**negative, "value": 0.35}, "value": 1},
    }
    first, last = rows[0], rows[-1]
    return spec.figure(
        f"Top {len(rows)} heads: {scores.method} (\u00b1 1 standard error)",
        f"Bar chart of {len(rows)} heads from {first['cell']} at {first['score']:+.3g} to "
        f"{last['cell']} at {last['score']:+.3g} logits.",
        {
            "width": 300, "height": {"step": 19}, "data": {"values": rows},
            "encoding": {"y": name("cell", scale={"domain": [row["cell"] for row in rows]})},
            "layer": [
                layer("bar", x=x, **paint, tooltip=tips(cell="head", score="score")),
                layer("rule", look={"color": INK}, x=x | {"field": "low"}, x2={"field": "high"}),
            ],
        },
        width=320,
    )  # fmt: skip


def effects(labels: Sequence[str]) -> Figure:
    """Draw the effect of one head on every prompt by gold label; a page fills in the rows.

    Args:
        labels: The labels.
    """
    x = field("effect", UNIT)
    lane = field("lane", scale={"domain": [-3, 3], "range": [8, 34]})
    told = tips(prompt="prompt", label="gold label", effect="effect")
    dots = {"size": 26, "opacity": 0.55, "color": POSITIVE}
    mean = {"color": POINTED, "thickness": 3, "size": 26}
    body = {
        "width": 300, "height": {"step": 44}, "data": {"name": "effects", "values": []},
        "encoding": {"y": name("label", "gold label", scale={"domain": list(labels)})},
        "layer": [
            rule("x", 0),
            layer("circle", look=dots, x=x, yOffset=lane, tooltip=told),
            layer("tick", look=mean, x=x | {"aggregate": "mean"}),
        ],
    }  # fmt: skip
    words = "One dot for each prompt, by gold label. The thick line is the mean of the label."
    return spec.figure("Effect on every prompt", words, body, width=320)


def _line(
    result: FaithfulnessCurve, line: str, f: Any, low: Any = None, high: Any = None
) -> list[Spec]:
    """Return a row for each size that keeps a head."""
    columns = {"f": f, "low": low, "high": high}
    known = {key: np.asarray(values) for key, values in columns.items() if values is not None}
    sizes = enumerate(zip(result.sizes, result.fractions, strict=True))
    return [
        {"line": line, "heads": heads, "fraction": fraction}
        | {key: float(values[place]) for key, values in known.items()}
        for place, (heads, fraction) in sizes
        if heads > 0 and fraction > 0
    ]


def _levels(f: Spec, ablated: str) -> list[Spec]:
    """Draw f of the full model and f of the empty run."""
    rows = [{"f": 1, "words": "full model"}, {"f": 0, "words": f"{ablated} ablated"}]
    left = {"x": {"value": 0}, "y": f}
    look = {"color": MUTED, "align": "left", "baseline": "bottom", "dx": 3, "dy": -2}
    return [
        layer("rule", rows, "", {"color": MUTED}, **left, x2={"value": "width"}),
        layer("text", rows, "", look, **left, text=name("words")),
    ]


def _notes(scores: Scored, values: np.ndarray, end: float) -> Spec:
    """Return the marks of cells that are negative, not scored, or not clearly other than 0."""
    where = (
        values < -_DASH_FROM * end, ~np.isfinite(values), scores.unresolved.cpu().numpy()
    )  # fmt: skip
    rows = [
        {"layer": row, "head": head, "note": note, "dark": values[row, head] < -0.55 * end}
        for note, cells in zip(_NOTES, where, strict=True)
        for row, head in np.argwhere(cells).tolist()
    ]
    ink = {"condition": {"test": "datum.dark", "value": "white"}, "value": INK}
    legend = {"title": None, "columns": 3, "symbolStrokeColor": INK}
    present = [note for note in _NOTES if any(row["note"] == note for row in rows)]
    shape = name("note", legend=legend, **looks(present, map(_NOTES.get, present)))
    look = {"size": 40, "strokeWidth": 1.2, "filled": False}
    return layer("point", rows, "", look, shape=shape, stroke=ink)


def _check_map(circuit: Circuit | None, limit: float | None, n_layers: int, n_heads: int) -> None:
    if limit is not None and not limit > 0:
        raise InputError(f"heatmap: limit must be positive, got {limit}")
    if circuit is None or (circuit.n_layers, circuit.n_heads) == (n_layers, n_heads):
        return
    raise InputError(
        f"heatmap: the scores have {n_layers} layers of {n_heads} heads, the circuit "
        f"{circuit.n_layers} of {circuit.n_heads}; pass a circuit of the same model"
    )
