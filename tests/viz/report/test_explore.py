"""The linked part of a report: its numbers are those of the results, and a person can reach them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import sample_graph, sample_results as sample
from helpers.browser import Browser, open_browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.models.heads import Head
from cdt_lens.viz.report import explore
from cdt_lens.viz.report.report import render_report

HOSTILE = "<script>window.__pwned=1</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of results, and a report of what was loaded from them."""
    folder = tmp_path_factory.mktemp("run")
    scores, curve, moved = sample.scores(), sample.curve(), sample.transfer()
    scores.save(folder / "scores.json")
    curve.save(folder / "faithfulness.json")
    moved.save(folder / "transfer.json")
    loaded = HeadScores.load(folder / "scores.json")
    results = [
        loaded, loaded.select(fraction=0.1), FaithfulnessCurve.load(folder / "faithfulness.json"),
        TransferResult.load(folder / "transfer.json"), sample.agreement(), sample_graph.large(),
        sample.attention_view(), sample.token_relevance(), sample.adaptation(),
    ]  # fmt: skip
    render_report(*results, path=folder / "report.html", title="A run")
    return folder


def opened(run: Path, browser: Browser, *, width: int = 1280) -> Browser:
    browser.open(run / "report.html", width=width)
    for name in ("map", "effects", "curve"):
        show(browser, f"#explore-{name}")
    browser.run("document.getElementById('explore').scrollIntoView({behavior: 'instant'})")
    return browser


def show(browser: Browser, place: str, drawn: str = "svg") -> None:
    """Scroll to a place, again as the page grows, until something is drawn there."""
    browser.wait(
        f"const place = document.querySelector({place!r});"
        "place.scrollIntoView({block: 'center', behavior: 'instant'});"
        f"return place.querySelector({drawn!r}) !== null"
    )


def facts(browser: Browser) -> dict[str, str]:
    pairs = browser.run(
        "return [...document.querySelectorAll('#explore-facts div')].map(d => "
        "[...d.children].map(e => e.textContent))"
    )
    return {
        "head": browser.run("return document.getElementById('explore-name').textContent"),
        **dict(pairs),
    }


def expected(scores: HeadScores, head: Head) -> str:
    low, high = (float(limit[head.layer, head.head]) for limit in scores.interval())
    return f"{float(scores.values[head.layer, head.head]):+.4f} [{low:+.4f}, {high:+.4f}]"


def point_at(browser: Browser, head: Head) -> None:
    cell = browser.run(
        "return [...document.querySelectorAll('#explore-map .mark-rect path')].find(p => "
        "(p.getAttribute('aria-label') || '').startsWith(arguments[0]))",
        f"head: {head.head}; layer: {head.layer};",
    )
    browser.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", cell)
    ActionChains(browser.driver).move_to_element(cell).perform()


def test_pointing_at_a_head_tells_its_score_ranks_effects_edges_and_attention(
    run: Path, browser: Browser
):
    scores, view, graph = (
        HeadScores.load(run / "scores.json"),
        sample.attention_view(),
        sample_graph.large(),
    )
    opened(run, browser)
    assert facts(browser)["head"] == str(scores.top(1)[0])
    for head in (scores.top(5)[4], Head(0, 0), graph.heads[0]):
        point_at(browser, head)
        browser.wait(f"return document.getElementById('explore-name').textContent === '{head}'")
        told = facts(browser)
        assert told["Score (logits)"] == expected(scores, head)
        assert told["Standard error"] == f"{float(scores.stderr[head.layer, head.head]):.4f}"
        assert told["In the circuit"] == ("yes" if head in scores.select(fraction=0.1) else "no")
        reference = sample.agreement().reference
        for method, ranked in (("cdt", scores), ("mean-ablation", reference)):
            assert told[f"Rank by {method}"] == f"{ranked.ranking().index(head) + 1} of 270"
        # One dot for each prompt, at its effect.
        browser.wait(
            "return document.querySelectorAll('#explore-effects .mark-symbol path').length === 24"
        )
        dots = browser.run(
            "return [...document.querySelectorAll('#explore-effects .mark-symbol path')]"
            ".map(p => p.getAttribute('aria-label'))"
        )
        drawn = sorted(float(re.search(r"; effect: (\S+)$", dot)[1]) for dot in dots)
        effects = scores.effects[:, head.layer, head.head].sort().values.tolist()
        assert drawn == pytest.approx(effects, rel=1e-5)
        for list_, edges in (
            ("in", [e for e in graph.kept_edges if e.target == str(head)]),
            ("out", [e for e in graph.kept_edges if e.source == str(head)]),
        ):
            items = browser.run(
                f"return [...document.querySelectorAll('#explore-{list_} li')].map(e => e.textContent)"
            )
            assert sorted(item.rpartition(": ")[2] for item in items) == sorted(
                f"{edge.score:+.4f} logits" for edge in edges
            )
        reads = browser.run(
            "return [...document.querySelectorAll('#explore-reads li')].map(e => e.textContent)"
        )
        assert len(reads) == (3 if head in view.heads else 0)
        for prompt, read in enumerate(reads):
            weights = view.patterns[prompt][view.heads.index(head), -1].sort(descending=True).values
            assert re.findall(r"\d\.\d{3}", read) == [f"{w:.3f}" for w in weights[:5].tolist()]
    assert browser.complaints() == []
    assert browser.requests() == [(run / "report.html").as_uri()]


def test_moving_the_size_outlines_the_heads_and_moves_f(run: Path, browser: Browser):
    scores = HeadScores.load(run / "scores.json")
    curve = FaithfulnessCurve.load(run / "faithfulness.json")
    opened(run, browser)
    slider = browser.driver.find_element("id", "explore-size")
    told = "return document.getElementById('explore-told').textContent"
    frame = curve.to_dataframe()
    # It starts at the size of the circuit.
    assert browser.run(told).startswith("27 heads (10 %): f = 0.840 [")
    slider.send_keys(Keys.HOME)
    for _, row in frame.iterrows():
        size = int(row["heads"])
        words = (
            f"{size} heads ({100 * row['fraction']:.3g} %): f = {row['faithfulness']:.3f} "
            f"[{row['faithfulness low']:.3f}, {row['faithfulness high']:.3f}]; without them "
            f"{row['completeness']:.3f}; random heads {row['random (median)']:.3f} "
        )
        assert browser.run(told).startswith(words)
        outlined = (
            "return [...document.querySelectorAll('#explore-map .mark-rect')][1]"
            ".querySelectorAll('path').length"
        )
        browser.wait(f"{outlined} === {size}")
        names = browser.run(
            "return [...[...document.querySelectorAll('#explore-map .mark-rect')][1]"
            ".querySelectorAll('path')].map(p => p.getAttribute('aria-label'))"
        )
        heads = {f"head: {head.head}; layer: {head.layer}" for head in scores.ranking()[:size]}
        assert set(names) == heads
        browser.wait(
            "return document.querySelectorAll('#explore-curve path[stroke=\"#c25100\"]').length"
            f" === {(frame['heads'] == size).sum()}"
        )
        slider.send_keys(Keys.ARROW_RIGHT)
    assert browser.complaints() == []


def test_everything_is_reached_by_the_keyboard(run: Path, browser: Browser):
    opened(run, browser)
    map_ = browser.driver.find_element("id", "explore-map")
    chooser = browser.driver.find_element("id", "explore-head")
    chooser.send_keys("L0H0")
    browser.wait("return document.getElementById('explore-name').textContent === 'L0H0'")
    map_.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert facts(browser)["head"] == "L1H1"
    map_.send_keys(*[Keys.ARROW_LEFT] * 3)
    assert facts(browser)["head"] == "L1H0"
    # The small attention patterns have names, and Enter enlarges one.
    view = "document.querySelector('.view.AttentionHeads')"
    show(browser, ".view.AttentionHeads", "[role=button]")
    browser.wait(f"return {view}.querySelectorAll('[role=button]').length === 12")
    button = browser.run(f"return {view}.querySelectorAll('[role=button]')[3]")
    name = str(sample.attention_view().heads[3])
    assert button.get_attribute("aria-label") == f"enlarge the pattern of {name}"
    button.send_keys(Keys.ENTER)
    browser.wait(f"return {view}.textContent.split('{name}').length >= 3")


def test_a_transfer_shows_the_measure_scopes_and_seeds_that_are_chosen(run: Path, browser: Browser):
    result = TransferResult.load(run / "transfer.json")
    opened(run, browser)
    box = browser.driver.find_element("css selector", ".measures")
    figure = box.get_attribute("data-figure")
    show(browser, f"#{figure}")
    points = (
        f"return [...document.querySelectorAll('#{figure} .mark-symbol path')]"
        ".map(p => p.getAttribute('aria-label') || '')"
    )

    def values() -> list[float]:
        return sorted(
            float(re.findall(r"value: ([\d.]+)", p)[-1])
            for p in browser.run(points)
            if "seed: " in p
        )

    browser.wait(f"return document.querySelectorAll('#{figure} .mark-symbol path').length > 54")
    assert values() == pytest.approx(sorted(result.cells["accuracy"]), rel=1e-6)
    browser.run(
        "const s = arguments[0].querySelector('select'); s.value = 'retention';"
        "s.dispatchEvent(new Event('change', {bubbles: true}))", box,
    )  # fmt: skip
    browser.wait(
        f"return document.querySelector('#{figure}').textContent.includes('Retention of each')"
    )
    assert values() == pytest.approx(sorted(result.cells["retention"]), rel=1e-6)
    box.find_element("css selector", f"input[value='{result.scopes.index('full')}']").click()
    kept = result.cells[result.cells["scope"] != "full"]["retention"]
    browser.wait(
        f"{points.replace('return ', 'return (')}).filter(p => p.includes('seed: ')).length === {len(kept)}"
    )
    assert values() == pytest.approx(sorted(kept), rel=1e-6)
    box.find_element("css selector", "input[name=seeds]").click()
    browser.wait(f"{points.replace('return ', 'return (')}).every(p => !p.includes('seed: '))")
    assert browser.complaints() == []


def test_the_rows_whose_answer_changed_are_filtered(run: Path, browser: Browser, tmp_path: Path):
    moved = sample.transfer(("javanese", "sundanese"), ("decision", "full"), per_example=True)
    flipped = {
        name: 1 - values.round() if "full|0" in name else values.round()
        for name, values in moved.per_example.items()
    }
    sentences = tuple((f"{HOSTILE} sentence {n}", "positive") for n in range(1, 21))
    moved = replace(moved, per_example=flipped, test_rows={"javanese": sentences})
    path = render_report(moved, sample.adaptation(), path=tmp_path / "r.html")
    browser.open(path)
    shown = (
        "return [...document.querySelectorAll('.TransferResult .changes tbody tr')]"
        ".filter(r => !r.hidden).map(r => [...r.children].map(c => c.textContent))"
    )
    every = browser.run(shown)
    # In one seed of three the other scope differs, on every row of both targets.
    assert len(every) == 40 and {row[3] for row in every} == {"full"}
    right = flipped["right|javanese|decision|0"]
    own = {row[1]: row[-1] for row in every if row[0] == "javanese"}
    for number, value in enumerate(right.tolist(), start=1):
        assert own[f"{HOSTILE} sentence {number}"] == (
            "decision better" if value else "full better"
        )
    for place, value in ((0, "javanese"), (1, "full better")):
        browser.run(
            "const s = document.querySelectorAll('.TransferResult .filter select')[arguments[0]];"
            "s.value = arguments[1]; s.dispatchEvent(new Event('change', {bubbles: true}))",
            place, value,
        )  # fmt: skip
    rows = browser.run(shown)
    assert len(rows) == int((right == 0).sum()) and {row[0] for row in rows} == {"javanese"}
    told = browser.run(
        "return document.querySelector('.TransferResult .filter output').textContent"
    )
    assert told == f"{len(rows)} of 40 rows"
    # The sentence of an adaptation is there as text.
    sentence = browser.run(
        "return document.querySelector('.AdaptResult .changes tbody').textContent"
    )
    assert "Makanannya <b>enak</b> sekali!" in sentence and "now right" in sentence
    assert browser.run("return typeof window.__pwned") == "undefined"
    assert browser.complaints() == []


@contextmanager
def coloured(browser: Browser, scheme: str) -> Iterator[None]:
    """The page as a person with this colour scheme has it."""

    def media(*features: dict[str, str]) -> None:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    media({"name": "prefers-color-scheme", "value": scheme})
    try:
        yield
    finally:
        media()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels_named_like_a_colour_keep_their_dots(browser: Browser, scheme: str, tmp_path: Path):
    scores = sample.scores()
    named = dict(
        zip(sorted(set(scores.example_labels)), ("white", "#ffffff", "black"), strict=True)
    )
    scores = replace(scores, example_labels=tuple(named[each] for each in scores.example_labels))
    render_report(scores, path=tmp_path / "report.html", title="A run")
    with coloured(browser, scheme):
        browser.open(tmp_path / "report.html")
        show(browser, "#explore-effects", ".mark-symbol path")
        places = (
            "return [...document.querySelectorAll('#explore-effects ' + arguments[0])].map(e => "
            "[e.getAttribute('aria-label') || e.textContent, e.getBoundingClientRect()])"
            ".map(([words, box]) => [words, (box.top + box.bottom) / 2])"
        )
        dots = browser.run(places, ".mark-symbol path")
        rows = dict(browser.run(places, ".role-axis-label text"))
        show(browser, "#explore-map", "stop")
        shades = browser.run(
            "return [...document.querySelectorAll('#explore-map stop')]"
            ".map(stop => stop.getAttribute('stop-color'))"
        )
    assert set(named.values()) <= set(rows)
    for words, place in dots:
        label = re.search(r"gold label: ([^;]+);", words)[1]
        assert abs(place - rows[label]) < 22, f"{words}: not in its row, which is 44 pixels high"
    # The colours of a scale are those of the scheme.
    assert shades[-1] == {"light": "rgb(33, 102, 172)", "dark": "rgb(116, 180, 242)"}[scheme]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(run: Path, browser: Browser, scheme: str):
    axe = pytest.importorskip("axe_core_python.base")
    source = (Path(axe.__file__).parent / "axe.min.js").read_text("utf-8")
    with coloured(browser, scheme):
        opened(run, browser)
        browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        for index in range(
            browser.run("return document.querySelectorAll('.view, .drawing').length")
        ):
            part = f"document.querySelectorAll('.view, .drawing')[{index}]"
            browser.run(f"{part}.scrollIntoView()")
            browser.wait(
                f"return {part}.querySelector('canvas, .colored-tokens span, svg') !== null"
            )
        browser.run(source)
        browser.driver.set_script_timeout(120)
        # The inside of a figure is an image with a name; its thousand marks would take minutes.
        found = browser.driver.execute_async_script(
            "const done = arguments[0]; axe.run({exclude: [['.drawing svg']]}).then(r => done(r.violations.map(v => "
            "[v.impact, v.id, v.nodes.slice(0, 3).map(n => n.html.slice(0, 200))])))"
        )
    assert [fault for fault in found if fault[0] in ("serious", "critical")] == []


def test_a_report_without_javascript_has_the_tables(run: Path):
    page = (run / "report.html").read_text("utf-8")
    shell = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    top = HeadScores.load(run / "scores.json").top(1)[0]
    assert f'<th scope="row">{top}</th>' in shell
    assert "What each head reads most from the last position" in shell
    assert "JavaScript, which is switched off here" in shell


# What is linked ------------------------------------------------------------------------------------


def test_a_curve_of_other_scores_is_not_linked():
    scores, curve = sample.scores(), sample.curve()
    assert explore.measured_for(curve, scores)
    other = replace(scores, provenance=replace(scores.provenance, task_hash="cd" * 32))
    assert not explore.measured_for(curve, other)
    linked = explore.explorer([other, curve])
    assert linked and linked.data["sizes"] == [] and "curve" not in linked.figures
    assert explore.linked_curve([other, scores, curve]) is None, "the map shows the first scores"
    # Scores of another seed or estimate have the same options and task.
    options = {**curve.provenance.options, "scores_hash": scores.hash}
    named = replace(curve, provenance=replace(curve.provenance, options=options))
    again = replace(scores, values=scores.values.roll(1))
    assert explore.linked_curve([again, named]) is None
    assert explore.linked_curve([scores, named]) is named
    foreign = replace(curve, provenance=scores.provenance)
    assert explore.linked_curve([scores, foreign, curve]) is curve


def test_only_the_circuit_that_the_curve_kept_has_its_f():
    scores, curve = sample.scores(), sample.curve()
    ranking = scores.ranking()
    circuit = scores.select(fraction=0.1)
    assert curve.sizes[explore.own_size(curve, ranking, circuit)] == 27
    assert explore.own_size(curve, ranking, scores.select(k=26)) is None
    assert explore.own_size(curve, ranking, scores.select(k=27, by="magnitude")) is None


def test_f_outside_0_to_1_comes_with_a_reason(tmp_path: Path):
    curve = sample.curve()
    odd = replace(curve, faithfulness=torch.tensor([0, -2.7, *curve.faithfulness[2:].tolist()]))
    page = render_report(odd, path=tmp_path / "r.html").read_text("utf-8")
    kept = curve.empty - 2.7 * (curve.full - curve.empty)
    assert (
        f"f = -2.70 with 1 heads: kept alone they give {kept:+.3f} logits, which is below" in page
    )
    assert "heads ablated, MLPs intact" in page and "no heads" not in page
    assert "f outside 0 to 1" not in render_report(curve, path=tmp_path / "r.html").read_text(
        "utf-8"
    )


def test_the_circuits_own_f_is_the_first_number_of_its_section(tmp_path: Path):
    results = sample.scores(), sample.circuit(), sample.curve()
    page = render_report(*results, path=tmp_path / "r.html").read_text("utf-8")
    assert "<strong>0.84</strong><span>faithfulness f of the circuit: 27 of 270 heads<" in page
    assert ">CPR<" not in page and "mean of f over the sizes of circuits (CPR)" in page


def test_prompts_whose_tokens_lost_their_spaces_are_read(tmp_path: Path):
    view = sample.attention_view((("guests", "disliked", "this", "film"),))
    page = render_report(view, path=tmp_path / "r.html").read_text("utf-8")
    assert "Prompt 1: guests disliked this film</h3>" in page
    spaced = sample.attention_view((("guests", " disliked", " this", " film"),))
    page = render_report(spaced, path=tmp_path / "r.html").read_text("utf-8")
    assert "Prompt 1: guests disliked this film</h3>" in page


def test_a_large_model_keeps_the_effects_of_its_strongest_heads(monkeypatch):
    monkeypatch.setattr(explore, "_MOST_EFFECTS", 24 * 10)
    scores = sample.scores()
    data = explore.explorer([scores]).data
    assert list(data["effects"]) == [str(head) for head in scores.top(10, by="magnitude")]
    assert len(data["heads"]) == 270


def test_scores_of_a_circuit_alone_and_unscored_heads_are_linked():
    circuit = sample.circuit()
    linked = explore.explorer([circuit])
    assert linked and set(linked.figures) == {"map"} and linked.data["ranks"] == []
    scores = sample.scores(2, 3)
    values = scores.values.clone()
    values[1, 2] = torch.nan
    data = explore.explorer([replace(scores, values=values)]).data
    assert data["heads"][5]["score"] is None and data["ranks"][0]["places"][5] is None
    assert json.dumps(data, allow_nan=False)
    assert explore.explorer([sample.curve()]) is None
