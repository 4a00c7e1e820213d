from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch
from helpers import sample_results as sample
from helpers.browser import Browser, open_browser

from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.viz import scripts, widgets

HOSTILE = (
    "<s>",
    " <script>window.__pwned=1</script>",
    "</script><img src=x onerror=window.__pwned=2>",
    "<!--<script>",
    " &lt;b&gt; &amp",
    "\u2028\u2029\n",
    "]]>",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def data_of(html: str) -> list[dict]:
    found = re.search(r'<script type="application/json" id="cdt-data">(.*?)</script>', html, re.S)
    return json.loads(found.group(1))["views"]


def test_attention_hands_over_every_head_and_token():
    view = sample.attention_view()
    props = widgets.attention(view, 1).props
    torch.testing.assert_close(
        torch.tensor(props["attention"]), view.patterns[1], atol=5e-5, rtol=0
    )
    assert props["attentionHeadNames"] == [str(head) for head in view.heads]
    assert props["tokens"] == list(view.prompts[1])
    assert props["maskUpperTri"] is True


def test_token_colours_mean_the_same_in_every_prompt():
    relevance = sample.token_relevance()
    largest = max(float(values.abs().max()) for values in relevance.relevance)
    for index in range(3):
        props = widgets.colored_tokens(relevance, index).props
        assert (props["minValue"], props["maxValue"]) == (-largest, largest)
        shown = torch.tensor(props["values"])
        torch.testing.assert_close(shown, relevance.relevance[index], atol=0, rtol=1e-3)
    zeros = replace(relevance, relevance=tuple(0 * values for values in relevance.relevance))
    assert widgets.colored_tokens(zeros).props["maxValue"] == 1.0


@pytest.mark.parametrize("prompt", [-1, 3])
def test_a_prompt_that_is_not_there_is_refused(prompt):
    with pytest.raises(InputError, match=rf"no prompt {prompt}; it has 3"):
        widgets.attention(sample.attention_view(), prompt)
    with pytest.raises(InputError, match=rf"no prompt {prompt}; it has 3"):
        widgets.colored_tokens(sample.token_relevance(), prompt)


def test_numbers_that_do_not_fit_the_tokens_are_refused():
    view, relevance = sample.attention_view(), sample.token_relevance()
    with pytest.raises(InputError, match=r"prompt 0: expected a pattern .*\(12, 11, 11\)"):
        widgets.attention(replace(view, patterns=(view.patterns[1], *view.patterns[1:])))
    with pytest.raises(InputError, match="prompt 0: expected 11 values"):
        widgets.colored_tokens(replace(relevance, relevance=relevance.relevance[1:]))


def test_numbers_that_are_not_finite_are_refused():
    view, relevance = sample.attention_view(), sample.token_relevance()
    patterns = (view.patterns[0] * torch.nan, *view.patterns[1:])
    with pytest.raises(NonFiniteError, match="AttentionView, prompt 0"):
        widgets.attention(replace(view, patterns=patterns))
    values = (*relevance.relevance[:2], relevance.relevance[2] / 0)
    with pytest.raises(NonFiniteError, match="TokenRelevance, prompt 2"):
        widgets.colored_tokens(replace(relevance, relevance=values), 2)


def test_scripts_hold_the_bundle_once_and_the_data_unbroken():
    views = [
        widgets.attention(sample.attention_view((HOSTILE,)), id="a"),
        widgets.colored_tokens(sample.token_relevance((HOSTILE,)), id="b"),
    ]
    html = scripts.scripts({"views": widgets.data(views)}, ["circuitsvis"])
    assert html.count("var CircuitsVis") == 1
    assert html.lower().count("</script") == html.lower().count("<script ") + 2 == 3
    first, second = data_of(html)
    assert first["props"]["tokens"] == list(HOSTILE)
    assert (first["id"], second["component"]) == ("a", "ColoredTokens")
    block = html[: html.index("</script>")]
    assert block.count("<") == 1 and block.isascii()


def test_a_page_without_views_needs_no_script_and_no_circuitsvis(monkeypatch):
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    assert scripts.scripts({"views": []}, []) == ""
    assert "script-src 'none'" in scripts.policy([])


def test_the_policy_allows_no_network_and_no_other_script():
    policy = scripts.policy(["circuitsvis"])
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]+=' 'sha256-[\w+/]+='", rules["script-src"])
    assert rules["img-src"] == "data:"


def test_a_widget_is_a_frame_that_cannot_touch_the_notebook():
    html = widgets.attention_widget(sample.attention_view((HOSTILE,)))._repr_html_()
    assert html.count("<") == 2 and html.count(">") == 2
    assert 'sandbox="allow-scripts"' in html
    document = unescape(re.search(r'srcdoc="(.*?)" sandbox', html, re.S).group(1))
    assert data_of(document)[0]["props"]["tokens"] == list(HOSTILE)


@pytest.mark.parametrize("kind", ["attention", "tokens"])
def test_a_widget_is_drawn_offline_in_a_notebook(kind: str, browser: Browser, tmp_path: Path):
    if kind == "attention":
        widget = widgets.attention_widget(sample.attention_view((HOSTILE,)))
    else:
        widget = widgets.tokens_widget(sample.token_relevance((HOSTILE,)))
    page = tmp_path / "notebook.html"
    page.write_text(f'<!doctype html><meta charset="utf-8">{widget._repr_html_()}', "utf-8")
    browser.open(page)
    browser.driver.switch_to.frame(0)
    wanted = "canvas" if kind == "attention" else ".colored-tokens span"
    browser.wait(f"return document.querySelectorAll('{wanted}').length > 0")
    text = browser.run("return document.body.textContent").replace("\u2060", "")
    if kind == "tokens":
        shown = browser.run("return document.querySelector('.colored-tokens').textContent")
        shown = shown.replace("\u2060", "").replace("\xa0", " ")
        for token in HOSTILE[:5]:
            assert token in shown
        assert browser.run("return document.querySelectorAll('.colored-tokens img').length") == 0
    assert "switched off" not in text
    assert browser.run("return typeof window.__pwned") == "undefined"
    browser.driver.switch_to.default_content()
    assert browser.run("return typeof window.__pwned") == "undefined"
    assert browser.complaints() == []
    assert set(browser.requests()) <= {page.as_uri(), "about:srcdoc"}
