"""Every result shows itself: a short line, a table or figure that is escaped and needs no network."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import sample_comparison, sample_graph, sample_results as sample
from helpers.browser import Browser, open_browser
from helpers.public import NAMES
from helpers.tiny_tasks import LABELS, examples

import cdt_lens as cdt
from cdt_lens import Head
from cdt_lens.circuits.direct_edge_scores import DirectEdgeScores
from cdt_lens.circuits.edge_faithfulness import EdgeFaithfulness
from cdt_lens.comparing.comparison import RankingCurve
from cdt_lens.core import display
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.targets import TargetParts
from cdt_lens.planted.catalogue import planted_circuit
from cdt_lens.scoring.edge_scores import EdgeScores

HOSTILE = "<script>window.__pwned=1</script>&amp;<b>"
SETTINGS = "plain settings; the dataclass's own repr names each of them"
NAME = "a name or a part of a row, printed with the result that it stands in"
# Public dataclasses that are no results.
EXCEPTIONS = {
    "Edge": NAME, "GraphNode": NAME, "Head": NAME, "Mlp": NAME, "Node": NAME,
    "Rules": SETTINGS, "Slopes": SETTINGS, "TrainingOptions": SETTINGS, "TransferConfig": SETTINGS,
    "AdaptSettings": SETTINGS,
}  # fmt: skip


def task() -> cdt.Task:
    data = replace(examples(), name=HOSTILE)
    first = replace(data.items[0], prompt=HOSTILE + " and more of it" * 20)
    data = replace(data, items=(first, *data.items[1:]))
    return cdt.Task(
        name=HOSTILE, labels=LABELS, verbalizer=dict.fromkeys(LABELS, f" {HOSTILE}"),
        verbalizer_ids={}, template=HOSTILE, train=data, valid=data[:0], test=data[:2],
        content_free=data[:0],
    )  # fmt: skip


def decomposition() -> cdt.Decomposition:
    logits = torch.tensor([[1.0, 0.0], [0.5, 0.25]])
    relevant = torch.tensor([[[0.5, 0.0], [0.0, 0.25]], [[1.0, 1.0], [0.0, 0.0]]])
    sources = ((Head(0, 1),), (cdt.Mlp(1), cdt.Node(0, 0, -1)))
    direction = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    parts = TargetParts(torch.zeros(2, 2, 3, 4), torch.ones(2, 2, 3, 4))
    tokens = torch.tensor([[1, 2], [3, 4]])
    targets = {("q", Head(1, 0)): parts}
    return cdt.Decomposition(sources, tokens, direction, logits, relevant, targets)


def edge_scores() -> EdgeScores:
    heads = torch.zeros(2, 3, 2, 2)
    heads[0, 1, 1, 0] = -0.75
    mlps = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    return EdgeScores((Head(0, 1), cdt.Mlp(1)), torch.tensor([0.25, 0.125]), heads, mlps)


def direct_edge_scores() -> DirectEdgeScores:
    edges = (("input", "L0H0", "q"), ("L0H0", "M0", ""), ("M0", "logits", ""))
    values = torch.tensor([0.5, -0.25, torch.nan])
    rows = values.repeat(2, 1)
    return DirectEdgeScores(
        edges, values, values.abs(), rows, LABELS[:2], 1.5, HOSTILE, 1, 1, 4, False,
        sample.provenance(),
    )  # fmt: skip


def edge_faithfulness() -> EdgeFaithfulness:
    rows = torch.tensor([[0.4, 0.6], [1.0, 1.0]], dtype=torch.float64)
    return EdgeFaithfulness(
        (3, 9), rows.mean(1), torch.tensor([[0.1, 1.0]], dtype=torch.float64), 2.0, 0.5,
        "direction", sample.provenance(), rows, torch.tensor([0, 0]), (0.5, 1.0),
    )  # fmt: skip


def circuit_faithfulness() -> cdt.CircuitFaithfulness:
    draws = {"random": torch.tensor([0.1, 0.2, 0.4])}
    return cdt.CircuitFaithfulness(
        (Head(0, 1), Head(1, 0)), 0.9, 0.05, draws, {"random": 1.0}, 2.0, 0.5, "direction",
        sample.provenance(),
    )  # fmt: skip


def evaluation() -> cdt.Evaluation:
    confusion = pd.DataFrame([[1, 2], [0, 3]], index=["a", HOSTILE], columns=["a", HOSTILE])
    confusion.index.name, confusion.columns.name = "gold", "predicted"
    return cdt.Evaluation(HOSTILE, 0.75, None, 1.25, 0.5, 6, 0.75, confusion)


def hostile_origin(result: Any) -> Any:
    return replace(result, provenance=replace(result.provenance, task=HOSTILE, model=HOSTILE))


RESULTS: dict[str, Callable[[], Any]] = {
    "Adapter": lambda: replace(
        sample.fine_tuning().adapter, scope=HOSTILE, whole={HOSTILE: torch.ones(3)}
    ),
    "AttentionView": lambda: sample.attention_view(((HOSTILE, "b"),)),
    "Baseline": lambda: cdt.Baseline(
        "answer", torch.arange(12.0).reshape(2, 1, 2, 3), hostile_origin(sample.scores()).provenance
    ),
    "Circuit": sample.circuit,
    "CircuitFaithfulness": circuit_faithfulness,
    "Comparison": lambda: hostile_origin(sample_comparison.comparison()),
    "Decomposition": decomposition,
    "EdgeScores": edge_scores,
    "DirectEdgeScores": direct_edge_scores,
    "EdgeFaithfulness": edge_faithfulness,
    "Evaluation": evaluation,
    "Reliability": lambda: cdt.Reliability(0.86, 0.92, 0.4, 128),
    "Example": lambda: task().train[0],
    "Examples": lambda: task().train,
    "FaithfulnessCurve": sample.curve,
    "FineTuneResult": lambda: replace(sample.fine_tuning(), scope=HOSTILE),
    "Graph": sample_graph.large,
    "HeadScores": lambda: replace(sample.scores(), method=HOSTILE),
    "MethodAgreement": sample.agreement,
    "MethodResult": lambda: replace(
        sample_comparison.comparison().methods[0], description=HOSTILE, refused=HOSTILE
    ),
    "PlantedCircuit": lambda: replace(planted_circuit("hand-or"), why=HOSTILE),
    "PlantedComparison": sample_comparison.planted,
    "Task": task,
    "TokenRelevance": lambda: sample.token_relevance(((HOSTILE, "b"),)),
    "AdaptResult": lambda: replace(sample.adaptation(), chosen=HOSTILE),
    "TransferResult": lambda: replace(sample.transfer(), task=HOSTILE, proxy=HOSTILE),
}


@functools.cache
def made(name: str) -> Any:
    return RESULTS[name]()


def public_dataclasses() -> Iterator[str]:
    for name, value in NAMES.items():
        if inspect.isclass(value) and dataclasses.is_dataclass(value):
            yield name


@pytest.mark.parametrize("name", sorted(public_dataclasses()))
def test_every_public_dataclass_shows_itself_or_has_a_reason(name: str):
    if name in EXCEPTIONS:
        assert name not in RESULTS and EXCEPTIONS[name]
        return
    result = made(name)
    assert type(result).__name__ == name
    text = repr(result)
    assert text.startswith(f"{name}(") and len(text) <= 400 and "\n" not in text, text
    assert "tensor(" not in text and "DataFrame" not in text
    html = result._repr_html_()
    outside = re.sub(r'srcdoc="[^"]*"', "", html)
    assert "<script" not in outside and "<b>" not in outside, "escaped"
    assert re.search("<(table|svg|iframe)", html), "a table, a figure or a view"
    assert not re.search(r'(src|href)="(?!#|data:)', outside), "nothing is fetched"
    assert "tensor(" not in outside


@pytest.mark.parametrize("name", sorted(set(RESULTS) - {"Example"}))
def test_every_result_is_a_data_frame_with_documented_units(name: str):
    frame = made(name).to_dataframe()
    assert isinstance(frame, pd.DataFrame) and len(frame)
    method = NAMES[name].to_dataframe
    assert method.__doc__ and method.__doc__.strip(), "its rows and units are said"


def test_nothing_is_listed_that_does_not_exist():
    assert set(EXCEPTIONS) | set(RESULTS) == set(public_dataclasses())


def test_what_functions_return_is_public_or_shown():
    """A public function's result is one of the types above, a plain value, or a path."""
    plain = {
        "Tensor",
        "float",
        "Path",
        "str",
        "dict",
        "Model",
        "Module",
        "tuple",
        "int",
        "None",
        "Figure",
    }
    known = {*RESULTS, *EXCEPTIONS} | plain
    for name, function in NAMES.items():
        if not inspect.isfunction(inspect.unwrap(function)):
            continue
        told = str(inspect.signature(function).return_annotation)
        words = set(re.findall(r"[A-Z]\w+", re.sub(r'"[^"]*"', "", told)))
        unknown = words - known - {"Float", "Mapping", "Sequence", "Any", "Iterator"}
        assert not unknown, f"{name} returns {told}: show {unknown} as well"


# What the frames hold ------------------------------------------------------------------------------


def test_decomposition_rows_are_d_rel_of_each_source_and_example():
    frame = decomposition().to_dataframe()
    assert frame["sources"].tolist() == ["L0H1"] * 2 + [f"M1, {cdt.Node(0, 0, -1)}"] * 2
    assert frame["relevant"].tolist() == [0.5, -0.25, 0.0, 0.0]
    assert frame["direction"].tolist() == [1.0, 0.25, 1.0, 0.25]


def test_edges_are_sorted_by_magnitude_and_name_their_ends():
    rows = [tuple(row) for row in edge_scores().to_dataframe().itertuples(index=False)]
    assert rows == [
        ("L0H1", "L1H0", "k", -0.75), ("L0H1", "M1", "", 0.5),
        ("L0H1", "logits", "", 0.25), ("M1", "logits", "", 0.125),
    ]  # fmt: skip


def test_faithfulness_evaluation_and_baseline_rows():
    f = circuit_faithfulness().to_dataframe()
    assert f["f"].tolist() == pytest.approx([0.9, 0.05, 0.2])
    assert f["beaten"].isna().tolist() == [True, True, False]
    row = evaluation().to_dataframe().iloc[0]
    assert (row["accuracy"], row["direction"], row["loss"], row["examples"]) == (0.75, 1.25, 0.5, 6)
    means = made("Baseline").to_dataframe()
    assert means["norm"].tolist() == pytest.approx(
        [
            float(torch.tensor(v).norm())
            for v in ([0.0, 1, 2], [3.0, 4, 5], [6.0, 7, 8], [9.0, 10, 11])
        ]
    )
    empty = cdt.Baseline("zero", torch.zeros(0, 0, 0, 0), sample.provenance())
    assert len(empty.to_dataframe()) == 0 and "zero" in repr(empty) and empty._repr_html_()


def test_views_as_rows_have_a_row_a_weight_and_a_row_a_token():
    view, relevance = sample.attention_view(), sample.token_relevance()
    frame = view.to_dataframe()
    sums = frame.groupby(["prompt", "head", "query"])["weight"].sum()
    assert (sums - 1).abs().max() < 1e-5
    tokens = relevance.to_dataframe()
    assert tokens["token"].tolist() == [t for prompt in relevance.prompts for t in prompt]
    assert tokens["relevance"].tolist() == torch.cat(relevance.relevance).tolist()


def test_agreement_and_planted_rows():
    agreement, planted = sample.agreement(), made("PlantedCircuit")
    frame = agreement.to_dataframe()
    assert frame["score"].is_monotonic_decreasing
    frame = frame.sort_values(["layer", "index"])
    assert frame["reference"].tolist() == agreement.reference.values.flatten().tolist()
    assert frame["score"].tolist() == agreement.scores.values.flatten().tolist()
    assert planted.to_dataframe()["in_circuit"].sum() == int(planted.truth.sum())


def test_lines_are_short_whatever_the_size():
    scores = sample.scores()
    assert "270" in repr(scores.select(fraction=1.0))
    assert str(scores.top(1)[0]) in repr(scores)
    assert display.few(range(9), 3) == "0, 1, 2, ... (9)" and display.few([]) == ""
    assert display.short("a\nb" * 40).count("\n") == 0
    widget = sample.attention_view().widget()
    assert len(repr(widget)) < 100 and len(repr(RankingCurve((0.0,) * 99, 1.0, 1.0))) < 100


def test_a_type_that_nothing_draws_is_refused_by_name():
    class HeadScores:
        """A foreign class with the name of a result."""

    for show in (display.figure, display.page, display.table):
        with pytest.raises(InputError, match="cannot show a HeadScores; expected any of"):
            show(HeadScores())


def test_a_subclass_is_drawn_as_its_base():
    class Special(cdt.HeadScores):
        """The scores of somebody's own method."""

    scores = sample.scores(6, 4)
    values = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}
    assert Special(**values).heatmap() == scores.heatmap()


def test_results_are_imported_without_drawing():
    modules = (
        "circuits.circuit", "circuits.faithfulness", "comparing.comparison", "finetuning.result",
        "finetuning.transfer_result", "scoring.agreement", "scoring.prompt_views",
    )  # fmt: skip
    code = "".join(f"import cdt_lens.{module}\n" for module in modules)
    code += "import sys; print([m for m in sys.modules if m.startswith('cdt_lens.viz')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# In a real browser, without a network --------------------------------------------------------------

PAGE = """<!doctype html><html><head><meta charset="utf-8"><style>
body {{ background: {back}; color: {ink}; }}</style></head><body>{cells}</body></html>"""
OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:1")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile"), *OFFLINE) as opened:
        yield opened


def notebook(path: Path, results: list[Any], *, dark: bool = False) -> Path:
    """A page such as a notebook makes of the results' own HTML, a cell each."""
    cells = "".join(f'<div class="cell">{each._repr_html_()}</div>' for each in results)
    back, ink = ("#111", "#eee") if dark else ("#fff", "#111")
    path.write_text(PAGE.format(back=back, ink=ink, cells=cells), "utf-8")
    return path


def test_views_draw_in_a_notebook_without_a_network(browser: Browser, tmp_path: Path):
    prompt = ("<s>", "Not", " <bad>", " &", ":")
    view, relevance = sample.attention_view((prompt,)), sample.token_relevance((prompt,))
    browser.open(notebook(tmp_path / "page.html", [view, relevance]))
    frames = browser.driver.find_elements("tag name", "iframe")
    assert len(frames) == 2
    drawn = []
    for frame in frames:
        browser.run("arguments[0].scrollIntoView()", frame)
        browser.driver.switch_to.frame(frame)
        # Drawn by circuitsvis: patterns are images or canvases, coloured tokens spans.
        browser.wait(
            "return document.querySelectorAll('.view canvas, .view img, .view span').length"
        )
        colours = "return [...document.querySelectorAll('.view span')].map(e => getComputedStyle(e).backgroundColor)"
        drawn.append((browser.run("return document.body.innerText"), browser.run(colours)))
        browser.driver.switch_to.default_content()
    (heads, _), (words, colours) = drawn
    assert "L" in heads and str(view.heads[0]) in heads
    assert "Not" in words and "bad" in words
    assert len({c for c in colours if c.startswith("rgb(")}) >= 3, (
        "tokens have colours of their own"
    )
    outside = [
        url for url in browser.requests() if not url.startswith(("file:", "about:", "blob:"))
    ]
    assert outside == [], "nothing was asked of the network"
    assert not [line for line in browser.complaints() if "ERR_" in line or "Error" in line]


@pytest.mark.parametrize("dark", [False, True])
def test_every_result_reads_on_a_light_and_a_dark_page(
    browser: Browser, tmp_path: Path, dark: bool
):
    results = [made(name) for name in RESULTS]
    browser.open(notebook(tmp_path / "page.html", results, dark=dark))
    assert browser.run("return window.__pwned === undefined"), "what data hold is text"
    assert len(browser.run("return [...document.querySelectorAll('.cell')]")) == len(results)
    # Table cells take the page's own ink; figures bring a white ground for theirs.
    ink = {
        browser.run("return getComputedStyle(arguments[0]).color", cell)
        for cell in browser.driver.find_elements("css selector", "td")[:20]
    }
    assert ink == {"rgb(238, 238, 238)" if dark else "rgb(17, 17, 17)"}
    grounds = browser.run(
        "return [...document.querySelectorAll('svg')].map(s => "
        "getComputedStyle(s.querySelector('rect')).fill)"
    )
    assert grounds and set(grounds) == {"rgb(255, 255, 255)"}
    assert not [url for url in browser.requests() if not url.startswith(("file:", "about:"))]
