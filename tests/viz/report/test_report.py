from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import sample_graph, sample_results as sample
from helpers.browser import Browser, open_browser
from helpers.shared import shared
from helpers.tiny_tasks import many

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import circuit_faithfulness
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.scoring.methods import score_by
from cdt_lens.viz.report.report import render_report

SCRIPT = "<script>window.__pwned=1</script>"
BREAKOUT = '</script><img src=x onerror="window.__pwned=2">'
ATTRIBUTE = '" onmouseover="window.__pwned=3" x="'
HOSTILE = (SCRIPT, BREAKOUT, "<!--<script>", ATTRIBUTE, "\u2028", "\n")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return render_report(*sample.everything(), path=path, title="SmolLM2 on NusaX, English")


def hostile_results() -> list[object]:
    """Every text that a person or a data set can put into a result is an attack."""
    origin = replace(
        sample.provenance(),
        task=SCRIPT,
        options={BREAKOUT: SCRIPT, "nested": {ATTRIBUTE: BREAKOUT}},
    )
    scores = replace(sample.scores(), method=BREAKOUT, provenance=origin)
    circuit = replace(scores.select(k=9), selection={SCRIPT: BREAKOUT})
    agreement = replace(sample.agreement(), scores=scores)
    attention = replace(sample.attention_view((HOSTILE,)), labels=(SCRIPT,))
    relevance = replace(sample.token_relevance((HOSTILE,)), labels=(BREAKOUT,))
    tuned = sample.fine_tuning(SCRIPT)
    tuned = replace(tuned, options={BREAKOUT: SCRIPT}, stopped=ATTRIBUTE, provenance=origin)
    moved = sample.transfer((SCRIPT, BREAKOUT, ATTRIBUTE), (BREAKOUT, "decision"))
    moved = replace(
        moved,
        task=SCRIPT,
        proxy=BREAKOUT,
        auto=moved.auto.assign(rule=SCRIPT, inputs=BREAKOUT),
        discovery={SCRIPT: BREAKOUT},
        settings={BREAKOUT: {ATTRIBUTE: SCRIPT}},
    )
    graph = replace(sample_graph.large(), unit=BREAKOUT)
    return [scores, circuit, graph, agreement, attention, relevance, tuned, moved]


def mount_all(browser: Browser) -> None:
    """Scroll each view and figure into sight, and wait until it is drawn."""
    count = browser.run("return document.querySelectorAll('.view, .drawing').length")
    for index in range(count):
        view = f"document.querySelectorAll('.view, .drawing')[{index}]"
        browser.run(f"{view}.scrollIntoView({{behavior: 'instant'}})")
        browser.wait(f"return {view}.querySelector('canvas, .colored-tokens span, svg') !== null")


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="cdt-data">(.*?)</script>', page, re.S)
    return json.loads(found.group(1))


def sections(path: Path) -> list[str]:
    return re.findall(r'<section id="\w+" class="(\w+)"', path.read_text("utf-8"))


def test_sections_stand_in_the_order_of_the_method(report: Path):
    assert sections(report) == [
        "HeadScores", "Circuit", "FaithfulnessCurve", "MethodAgreement", "AttentionView",
        "TokenRelevance", "FineTuneResult", "TransferResult", "provenance",
    ]  # fmt: skip


def test_the_same_results_give_the_same_bytes(report: Path, tmp_path: Path):
    title = "SmolLM2 on NusaX, English"
    again = render_report(*reversed(sample.everything()), path=tmp_path / "r.html", title=title)
    assert again.read_bytes() == report.read_bytes()


def test_the_bundle_is_inlined_once_and_only_where_there_are_views(report: Path, tmp_path: Path):
    text = report.read_text("utf-8")
    assert text.count("var CircuitsVis") == text.count("window.vegaEmbed") == 1
    assert report.stat().st_size < 4_000_000
    small = render_report(sample.scores(), path=tmp_path / "small.html")
    assert "var CircuitsVis" not in small.read_text("utf-8")
    assert small.stat().st_size < 1_250_000


def test_a_report_without_views_does_not_import_circuitsvis(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    render_report(sample.circuit(), path=tmp_path / "r.html")


def test_nothing_in_the_file_is_loaded_from_elsewhere(report: Path):
    page = report.read_text("utf-8")
    shell = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?!data:)", shell)
    assert not re.findall(r"url\((?!#)|@import", shell)
    assert "<?xml" not in page


def test_a_result_of_another_type_is_refused_by_name(tmp_path: Path):
    with pytest.raises(InputError, match=r"no section for dict; expected any of HeadScores, Circ"):
        render_report({}, path=tmp_path / "r.html")
    with pytest.raises(InputError, match="at least one result"):
        render_report(path=tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_a_foreign_class_with_the_name_of_a_result_is_refused(tmp_path: Path):
    foreign = type("Circuit", (), {"heads": (), "n_layers": 2, "n_heads": 2, "scores": None})
    with pytest.raises(InputError, match="no section for Circuit; expected any of HeadScores"):
        render_report(sample.scores(), foreign(), path=tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_previous_report_as_it_was(tmp_path: Path):
    path = tmp_path / "r.html"
    path.write_text("before", "utf-8")
    view = sample.attention_view()
    with pytest.raises(NonFiniteError):
        broken = tuple(torch.nan * pattern for pattern in view.patterns)
        render_report(replace(view, patterns=broken), path=path)
    assert path.read_text("utf-8") == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_subclass_of_a_result_has_its_section(tmp_path: Path):
    class Special(Circuit):
        pass

    circuit = sample.circuit()
    special = Special(circuit.heads, circuit.n_layers, circuit.n_heads)
    assert sections(render_report(special, path=tmp_path / "r.html")) == ["Circuit"]


def test_a_map_is_drawn_once_for_a_circuit_and_its_own_scores(tmp_path: Path):
    scores = sample.scores()
    circuit = scores.select(k=5)
    copied = replace(circuit, scores=circuit.scores.clone())
    for results, maps in (((scores, circuit), 1), ((scores, copied), 1), ((circuit,), 1)):
        page = render_report(*results, path=tmp_path / "r.html").read_text("utf-8")
        assert page.count('aria-label="Score of every head') == maps
        assert len(data_of(page)["explore"]["circuit"]) == 5
    other = replace(circuit, scores=circuit.scores + 1)
    page = render_report(scores, other, path=tmp_path / "r.html").read_text("utf-8")
    assert page.count('aria-label="Score of every head') == 2


def test_results_of_one_kind_keep_apart(tmp_path: Path):
    path = render_report(sample.scores(), sample.scores(seed=1), path=tmp_path / "r.html")
    page = path.read_text("utf-8")
    assert ">Head scores: cdt</h2>" in page
    assert ">Head scores: cdt (2)</h2>" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_a_circuit_without_scores_or_provenance_has_a_section(tmp_path: Path):
    bare = Circuit(sample.circuit().heads, 30, 9)
    page = render_report(bare, path=tmp_path / "r.html").read_text("utf-8")
    assert "27 of 270" in page
    assert "not recorded" in page
    assert 'class="drawing"' not in page and "script-src &#39;none&#39;" in page


def test_a_circuits_graph_has_a_section_of_its_own_behind_it(tmp_path: Path):
    graph = sample_graph.large()
    circuit = Circuit(graph.heads, 30, 9, graph=graph)
    for results in ((sample.curve(), circuit), (graph, sample.curve(), circuit)):
        path = render_report(*results, path=tmp_path / "r.html")
        assert sections(path) == ["Circuit", "Graph", "FaithfulnessCurve", "provenance"]
    page = path.read_text("utf-8")
    assert ">40</strong><span>edges between 12 heads and 6 MLPs<" in page
    strongest = graph.top_edges(1)[0]
    assert f'<th scope="row">{strongest.source}</th><td>{strongest.target}</td>' in page
    # Pointing at a line names it; each line of the drawing has words of its own.
    drawn = data_of(page)["figures"]["s2-figure0"]["layer"][0]["data"]["values"]
    assert len({row["edge"] for row in drawn}) == 40
    assert f"{strongest.name}: {strongest.score:+.4g} logits" in {row["edge"] for row in drawn}
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_a_graph_without_edges_or_in_another_unit_has_a_section(tmp_path: Path):
    bare = replace(sample_graph.small(), edges=())
    page = render_report(bare, path=tmp_path / "r.html").read_text("utf-8")
    assert "heads in the graph, without edges" in page
    foreign = replace(sample_graph.small(), unit="nats")
    page = render_report(foreign, path=tmp_path / "r.html").read_text("utf-8")
    assert "in nats" in page and ">score</th>" in page and "0.5 logits" not in page


def test_half_a_character_in_a_token_does_not_stop_the_report(tmp_path: Path):
    tokens = ("\ud83d", "ok", "\x00", "\x1b", "\n", ":")
    results = sample.attention_view((tokens,)), sample.token_relevance((tokens,))
    render_report(*results, path=tmp_path / "r.html").read_text("utf-8")


def test_the_report_opens_offline_without_a_complaint(report: Path, browser: Browser):
    browser.open(report)
    mount_all(browser)
    assert browser.complaints() == []
    assert browser.requests() == [report.as_uri()]
    assert browser.driver.title == "SmolLM2 on NusaX, English"


def test_the_map_is_visible_with_a_named_cell_for_each_head(report: Path, browser: Browser):
    browser.open(report)
    browser.wait("return document.querySelector('#explore-map svg') !== null")
    marks = (
        "return [...document.querySelectorAll('#explore-map .mark-rect')].map(g => "
        "[...g.querySelectorAll('path')].map(p => [p.getBoundingClientRect().width, "
        "p.getBoundingClientRect().height, p.getAttribute('aria-label')]))"
    )
    browser.wait(f"{marks.replace('return ', 'return (')}).length > 1")
    cells, outlines, *_ = browser.run(marks)
    assert len(cells) == 270 and len(outlines) == 27
    assert min(min(width, height) for width, height, _ in cells) > 8
    assert cells[0][2].startswith("head: 0; layer: 0")


def test_the_views_draw_every_head_and_token(report: Path, browser: Browser):
    browser.open(report)
    mount_all(browser)
    counts = browser.run(
        "return [...document.querySelectorAll('.AttentionHeads')].map(v => "
        "v.querySelectorAll('canvas').length)"
    )
    assert counts == [13, 13, 13]  # twelve heads and the enlarged one
    texts = browser.run(
        "return [...document.querySelectorAll('.colored-tokens')].map(v => v.textContent)"
    )
    for text, tokens in zip(texts, sample.PROMPTS, strict=True):
        whole = "".join(tokens).replace("\n", "\u21b5 ")
        assert text.replace("\u2060", "").replace("\xa0", " ") == whole


def test_hostile_text_stays_text(browser: Browser, tmp_path: Path):
    path = render_report(*hostile_results(), path=tmp_path / "r.html", title=BREAKOUT)
    browser.open(path)
    mount_all(browser)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.run(
        "document.querySelectorAll('*').forEach(e => e.dispatchEvent(new Event('mouseover')))"
    )
    assert browser.run("return typeof window.__pwned") == "undefined"
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return document.scripts.length") == 4
    assert browser.driver.title == BREAKOUT
    for place in (
        "h1", "section.HeadScores > h2", "section.Circuit > .facts", ".Graph > .facts",
        ".Graph svg text", ".AttentionView .facts", "#explore-facts", "#explore-reads",
        ".AttentionView blockquote", ".TokenRelevance .facts", ".TokenRelevance tbody",
        ".colored-tokens", "#provenance", "svg text", ".TokenRelevance .example",
        ".FineTuneResult > h2", ".FineTuneResult table", ".FineTuneResult svg text",
        ".TransferResult > h2", ".TransferResult .facts", ".TransferResult th[rowspan]",
        ".TransferResult caption", ".TransferResult .settings", ".TransferResult svg text",
    ):  # fmt: skip
        shown = browser.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent).join(' ')",
            place,
        )
        shown = shown.replace("\u2060", "").replace("\xa0", " ").replace("\u00b7", " ")
        assert SCRIPT in shown or BREAKOUT in shown, place
    assert SCRIPT in browser.run("return document.querySelector('#provenance').innerText")
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]


def test_the_policy_stops_what_a_hole_would_let_in(report: Path, browser: Browser):
    browser.open(report)
    browser.run(
        """
        window.stopped = [];
        document.addEventListener("securitypolicyviolation",
          event => window.stopped.push(event.effectiveDirective));
        const hole = document.createElement("div");
        hole.innerHTML = '<img src="data:," onerror="window.__pwned=1">' +
          '<img src="http://127.0.0.1:9/x.png">';
        document.body.append(hole);
        const script = document.createElement("script");
        script.textContent = "window.__pwned = 1";
        document.body.append(script);
        fetch("http://127.0.0.1:9/").catch(() => {});
        """
    )
    wanted = {"img-src", "script-src-attr", "script-src-elem", "connect-src"}
    browser.wait("return new Set(window.stopped).size >= 4")
    # circuitsvis may ask for WebAssembly at this moment, which is "script-src" and stopped too.
    assert set(browser.run("return window.stopped")) - {"script-src"} == wanted
    assert browser.run("return typeof window.__pwned") == "undefined"


@pytest.mark.parametrize("width", [1400, 800, 500])
def test_the_page_fits_its_window(report: Path, browser: Browser, width: int):
    browser.open(report, width=width)
    mount_all(browser)
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")


def test_the_comparison_of_scopes_is_seen_whole_on_a_desk_and_words_stay_legible_on_a_phone(
    report: Path, browser: Browser
):
    browser.open(report, width=1400)
    cut = "const box = document.querySelector('.TransferResult .scroll');"
    assert browser.run(f"{cut} return box.scrollWidth <= box.clientWidth") is True
    assert browser.run(f"{cut} return box.scrollHeight <= box.clientHeight") is True
    browser.open(report, width=420)
    mount_all(browser)
    # The smallest words of the figures, in pixels of the window.
    sizes = browser.run(
        "return [...document.querySelectorAll('.drawing svg text')].filter(t => t.textContent)"
        ".map(t => parseFloat(getComputedStyle(t).fontSize)"
        " * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))"
    )
    assert len(sizes) > 100 and min(sizes) >= 9
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    # Vega ends a label with an ellipsis where it cuts it off.
    cut = browser.run(
        "return [...document.querySelectorAll('.drawing .role-legend-label text')]"
        ".map(t => t.textContent).filter(words => words.includes('\u2026'))"
    )
    assert cut == []


def test_the_page_can_be_read_without_seeing_it(report: Path, browser: Browser):
    browser.open(report)
    assert browser.run("return document.documentElement.lang") == "en"
    unnamed = browser.run(
        "return [...document.querySelectorAll('.drawing')].filter(d => !d.ariaLabel).length"
    )
    assert unnamed == 0
    levels = browser.run(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].filter(h => !h.closest('.view'))"
        ".map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert browser.run("return [...document.querySelectorAll('th')].every(h => h.scope)") is True
    dangling = browser.run(
        "return [...document.querySelectorAll('a[href]')].filter(a =>"
        " !document.getElementById(a.getAttribute('href').slice(1))).length"
    )
    assert dangling == 0
    ids = browser.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_a_print_shows_every_view_and_every_number(report: Path, browser: Browser):
    browser.open(report)
    browser.driver.print_page()
    browser.wait("return [...document.querySelectorAll('details')].every(d => d.open)")
    browser.wait("return [...document.querySelectorAll('.view')].every(v => v.children.length)")
    browser.wait("return document.querySelectorAll('.view canvas').length === 39")
    browser.wait(
        "return [...document.querySelectorAll('.drawing')].every(d => d.querySelector('svg'))"
    )


def test_a_task_at_chance_is_said_in_the_report(tmp_path: Path) -> None:
    words = "solves the task no better than chance"
    scores, curve = sample.scores(), sample.curve()
    good = render_report(scores, curve, path=tmp_path / "good.html").read_text("utf-8")
    assert words not in good
    poor = replace(scores, direction=-0.44), replace(curve, full=-0.1)
    page = render_report(*poor, path=tmp_path / "poor.html").read_text("utf-8")
    assert page.count(words) == 2 and "Caution" in page


def test_the_test_of_one_circuit_has_its_section(tmp_path: Path, tokenizer_folder: str):
    view, data = shared("gpt2", "bridge", tokenizer_folder), many(24)
    baseline = mean_activations(view, data, progress=False)
    scores = score_by("random", view, data, baseline)
    measured = circuit_faithfulness(
        view, scores.select(k=2), data, baseline, draws=3, progress=False
    )
    page = render_report(measured, path=tmp_path / "r.html")
    assert sections(page) == ["CircuitFaithfulness", "provenance"]
    text = page.read_text("utf-8")
    low, high = measured.interval
    assert f"{measured.faithfulness:.3f} [{low:.3f}, {high:.3f}]" in text
    assert f"{measured.completeness:.3f}" in text and "3 random heads" in text
    assert all(str(head) in text for head in measured.heads)
    assert scores.plot() == scores.heatmap()
