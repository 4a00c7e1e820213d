"""What a report shows of compared methods, and that the page stays readable and harmless."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import sample_comparison as sample, sample_results
from helpers.browser import Browser, open_browser

from cdt_lens.comparing.comparison import Comparison, MethodResult
from cdt_lens.viz.report.comparison_sections import comparison_section, planted_section
from cdt_lens.viz.report.report import render_report
from cdt_lens.viz.report.sections import Section

SCRIPT = "<script>window.__pwned=1</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def captions(section: Section) -> list[str]:
    return [table.caption for table in section.tables]


def test_a_comparison_is_headed_by_its_best_cpr():
    result = sample.comparison(refused=["random"])
    section = comparison_section(result, "s1", [result])
    best = result.best("cpr")
    run = "f = 0: heads ablated, MLPs intact"
    assert section.headline == (
        f"{best.value('cpr'):.3f}",
        f"best mean of f over the sizes of circuits (CPR), by {best.method}; {run}",
    )
    areas = result.random_areas()
    assert section.facts == {
        "Methods": "12, 1 refused",
        "Examples": "16 scored, 16 held out",
        "Task direction, scored": "+2.780 logits",
        "Held out": f"+2.810 logits with all heads, +0.120 in the empty run ({run})",
        "Random rankings": f"5: median CPR {areas['cpr']:.3f}, CMD {areas['cmd']:.3f}, "
        f"area on log sizes {areas['log_area']:.3f}",
        "Best Spearman": "integrated-gradients (0.620)",
        "Best CPR": f"cdt:both ({best.value('cpr'):.3f})",
        "Best CMD": f"cdt:stable ({result.best('cmd').value('cmd'):.3f})",
        "Best area on log sizes": f"cdt:both ({result.best('log_area').value('log_area'):.3f})",
    }
    best = "; \u2605 best of the column"
    real = f"area, log sizes ({run}), minus that of cdt:both; 95 % intervals over the same prompts"
    assert captions(section) == [
        f"Agreement and cost on 16 scored examples{best}",
        f"Use on 16 held-out examples ({run}){best}",
        f"Which differences are real, by signed score: {real}",
        f"Which differences are real, by magnitude: {real}",
        f"f of the top heads ({run}), by share and number of heads, with 95 % intervals over prompts",
        f"Areas ({run}) with 95 % intervals over prompts",
        "What the columns mean",
        "The methods",
    ]
    assert [name for name, _ in section.provenance] == ["Methods compared"]


def test_a_comparison_of_refusals_alone_has_a_section():
    result = replace(sample.comparison(), methods=(MethodResult("exact", refused="no"),))
    section = comparison_section(result, "s1", [result])
    assert section.headline == (
        "n/a",
        "best mean of f over the sizes of circuits (CPR), by no method; f = 0: heads ablated, MLPs "
        "intact",
    )
    assert "Best CPR" not in section.facts


def test_planted_circuits_are_headed_by_the_best_mean():
    planted = sample.planted()
    section = planted_section(planted, "s1", [planted])
    assert section.headline == ("1.000", "best mean average precision, by exact")
    assert [caption.split(" of ")[0] for caption in captions(section)] == [
        "average precision", "AUROC", "The planted circuits", "What the columns mean",
    ]  # fmt: skip
    assert len(section.provenance) == len(sample.CIRCUITS)


def test_the_section_stands_after_the_agreement(tmp_path: Path):
    results = [sample.planted(), sample.comparison(), sample_results.agreement()]
    page = render_report(*results, path=tmp_path / "r.html").read_text("utf-8")
    kinds = re.findall(r'<section id="\w+" class="(\w+)"', page)
    assert kinds == ["MethodAgreement", "Comparison", "PlantedComparison", "provenance"]
    assert page.count("<dt>A bad sign</dt>") == 3
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def hostile() -> list[object]:
    """Every text that a person or a method can put into a comparison is an attack."""
    result: Comparison = sample.comparison()
    one = replace(result.methods[1], method=SCRIPT, description=SCRIPT)
    two = MethodResult(f"{SCRIPT}2", SCRIPT, refused=SCRIPT)
    origin = replace(result.provenance, task=SCRIPT, model=SCRIPT, options={SCRIPT: SCRIPT})
    bad = replace(result, methods=(result.methods[0], one, two), provenance=origin)
    return [bad, replace(sample.planted(), circuits={SCRIPT: bad}, why={SCRIPT: SCRIPT})]


def test_hostile_text_stays_text(browser: Browser, tmp_path: Path):
    path = render_report(*hostile(), path=tmp_path / "r.html", title=SCRIPT)
    browser.open(path)
    browser.wait("return document.querySelector('.Comparison svg') !== null")
    assert browser.run("return typeof window.__pwned") == "undefined"
    for place in (".Comparison table", ".Comparison svg text", ".PlantedComparison table"):
        shown = browser.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent).join(' ')",
            place,
        )
        assert SCRIPT in shown, place
    assert browser.complaints() == [] and browser.requests() == [path.as_uri()]


def test_the_page_fits_its_window_and_names_its_dots(browser: Browser, tmp_path: Path):
    results = [sample.comparison(refused=["cdt:linear"]), sample.planted()]
    path = render_report(*results, path=tmp_path / "r.html")
    for width in (1400, 800, 500):
        browser.open(path, width=width)
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.open(path, width=1400)
    browser.wait("return document.querySelectorAll('.Comparison .mark-symbol path').length > 50")
    titles = browser.run(
        "return [...document.querySelectorAll('.Comparison .mark-symbol path')]"
        ".map(p => p.getAttribute('aria-label') || '')"
    )
    exact = [t for t in titles if t.startswith("CPR: 0.") and "exact; ranked by: signed" in t]
    assert len(exact) == 1
    # The tables of methods are seen whole on a desk.
    widths = "[...document.querySelectorAll('.Comparison .scroll')].slice(0, 2)"
    assert browser.run(f"return {widths}.every(box => box.scrollWidth <= box.clientWidth)") is True
    assert browser.complaints() == []
