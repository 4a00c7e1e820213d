"""The committed tutorials: a question and its answer, by public names alone, nothing of a machine.

`.ci/run` executes them; here is what can be seen without running anything.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from helpers.places import ROOT
from helpers.public import HOMES

import cdt_lens
from cdt_lens.experiments.demo_model import demo_tokenizer

NAMES = (
    "01_from_hypothesis_to_circuit", "02_do_scores_predict_ablation",
    "03_from_csv_to_served_adapter", "04_compare_methods", "05_which_head_feeds_which",
)  # fmt: skip
PUBLIC = {*cdt_lens.__all__, "__version__"}
FROM_MODULES = {f"cdt_lens.{home}.{name}" for name, home in HOMES.items() if name not in PUBLIC}
# Calls that may end a cell and show nothing.
QUIET = ("filterwarnings", "disable_progress_bar")
MACHINE = re.compile(r"(?<![\w.])/(?:root|home|Users|tmp|work|var|opt|usr|private|mnt)/|\b[A-Z]:\\")
NOISE = re.compile(r"Warning\b|\d+%\|.*\||\bit/s\b|\bTraceback\b|\b\d+(\.\d+)? ?(s|ms|min)\b")
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
INTERVAL = re.compile(r"\[-?\d+\.\d+, -?\d+\.\d+\]")
LARGEST = 150_000  # bytes: figures, and no view of circuitsvis, which carries 1.4 MB of script

Cell = dict[str, Any]


def cells(name: str, kind: str) -> list[Cell]:
    book = json.loads((ROOT / "tutorials" / f"{name}.ipynb").read_text("utf-8"))
    return [cell for cell in book["cells"] if cell["cell_type"] == kind]


def source(cell: Cell) -> str:
    """The cell's Python, without its magics."""
    lines = "".join(cell["source"]).splitlines()
    return "\n".join(line for line in lines if not line.startswith("%"))


def texts(output: Cell) -> Iterator[str]:
    """What a reader sees of an output in words: no pictures, no page within the page."""
    if output["output_type"] == "stream":
        yield "".join(output["text"])
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield re.sub(r'srcdoc="[^"]*"', "", "".join(value))


def shows(code: str) -> bool:
    """Whether a cell prints, or ends with a value."""
    tree = ast.parse(code)
    if any(isinstance(n, ast.Name) and n.id == "print" for n in ast.walk(tree)):
        return True
    if not tree.body or not isinstance(tree.body[-1], ast.Expr):
        return False
    value = tree.body[-1].value
    return not (isinstance(value, ast.Call) and getattr(value.func, "attr", "") in QUIET)


def _ours(module: str) -> bool:
    return module.split(".")[0] == "cdt_lens"


def private_names(code: str) -> list[str]:
    """Whatever a cell uses of `cdt_lens`, or of any object, that is not public."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [(a.name, a.asname) for a in node.names if a.name.split(".")[0] == "cdt_lens"]
            found += [name for name, alias in names if (name, alias) != ("cdt_lens", "cdt")]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            found += [name for name in names if _ours(name) and name not in FROM_MODULES]
        elif isinstance(node, ast.Attribute):
            ours = isinstance(node.value, ast.Name) and node.value.id == "cdt"
            if (ours and node.attr not in PUBLIC) or (not ours and node.attr.startswith("_")):
                found.append(node.attr)
    return found


def test_there_are_five():
    assert sorted(path.stem for path in (ROOT / "tutorials").glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", ["base", "english"])
def test_their_models_know_the_words_of_today(name: str):
    """A model that was made before the words changed reads some of them as unknown."""
    folder = ROOT / "tutorials" / "tiny" / name
    words = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    assert words == demo_tokenizer(["0.4"]).get_vocab(), "run tutorials/tiny/make.py"


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_a_question_and_ends_in_a_picture_that_answers_it(name: str):
    book = json.loads((ROOT / "tutorials" / f"{name}.ipynb").read_text("utf-8"))
    first, *_, picture, answer = book["cells"]
    assert len(re.findall(r"\*\*[^*]+\?\*\*", "".join(first["source"]))) == 1
    assert "image/svg+xml" in picture["outputs"][-1]["data"]
    words = "".join(answer["source"])
    assert words.startswith("**Answer: ") and INTERVAL.search(words)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_ran_in_order_and_left_what_it_shows(name: str):
    code = cells(name, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        tags = cell["metadata"].get("tags", [])
        assert not {"skip-execution", "raises-exception"} & set(tags)
        assert "execution" not in cell["metadata"], "when a cell ran is no part of a tutorial"
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert "error" not in kinds
        assert bool(kinds) == shows(source(cell)), source(cell)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_hold_nothing_of_a_machine(name: str):
    assert (ROOT / "tutorials" / f"{name}.ipynb").stat().st_size < LARGEST
    for cell in cells(name, "code"):
        assert not MACHINE.search("".join(cell["source"]))
        for output in cell["outputs"]:
            assert output.get("name") != "stderr", "".join(output["text"])
            for text in texts(output):
                assert not MACHINE.search(text), text
                assert not NOISE.search(text), text


@pytest.mark.parametrize("name", NAMES)
def test_only_public_names_are_used_and_results_are_asserted(name: str):
    code = [source(cell) for cell in cells(name, "code")]
    assert [private_names(text) for text in code] == [[]] * len(code)
    asserts = [n for text in code for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assert)]
    assert len(asserts) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_there_and_sharp_in_print(name: str):
    outputs = (output for cell in cells(name, "code") for output in cell["outputs"])
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert "image/svg+xml" in kinds and "image/png" not in kinds


@pytest.mark.parametrize("name", NAMES)
def test_figures_have_words_in_their_place(name: str):
    """The documentation shows them as the alternative text; without them it is a file's name."""
    for cell in cells(name, "code"):
        if any("image/svg+xml" in output.get("data", {}) for output in cell["outputs"]):
            words = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(words.split()) >= 8, source(cell)


@pytest.mark.parametrize("name", NAMES)
def test_the_way_with_a_real_model_is_told_in_public_names(name: str):
    text = "\n\n".join("".join(cell["source"]) for cell in cells(name, "markdown"))
    blocks = FENCE.findall(text.partition("## With a real model")[2])
    assert blocks and all("cdt." in block for block in blocks)
    assert [private_names(block) for block in blocks] == [[]] * len(blocks)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "tutorials" / link).exists(), link


@pytest.mark.parametrize(
    "code",
    [
        "import cdt_lens.scoring.prompt_views", "import cdt_lens", "from cdt_lens.scoring import prompt_views as cdt",
        "from cdt_lens import Head", "from cdt_lens.views import x", "cdt.views", "cdt._version",
        "cdt.score_hedas(model)", "model._places", "f(model.blocks[0]._hooks)",
    ],
)  # fmt: skip
def test_what_is_not_public_is_found(code: str):
    assert private_names(code)


def test_what_is_public_or_anothers_is_not():
    code = "import cdt_lens as cdt\nimport torch\ncdt.Head(0, 1).layer\ncdt.__version__"
    assert private_names(code) == []


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("a = 1", False), ("a = 1\na", True), ("for a in b:\n    print(a)", True),
        ("x.filterwarnings('ignore')", False), ("x.plot()", True), ("", False),
    ],
)  # fmt: skip
def test_a_cell_that_shows_something_is_told_from_one_that_does_not(code: str, shown: bool):
    assert shows(code) == shown


@pytest.mark.parametrize(
    "text",
    [
        "/root/x", "in /tmp/a/b", "'/home/me/model'", r"C:\Users\me", "UserWarning: old",
        "50%|#####     | 5/10", "12.3 s", "took 4 ms",
    ],
)  # fmt: skip
def test_machines_and_noise_are_found(text: str):
    assert MACHINE.search(text) or NOISE.search(text)


@pytest.mark.parametrize("text", ["train.csv, line 4", "the 99 % level", "f = 0.71", "and/or"])
def test_words_of_a_tutorial_are_neither(text: str):
    assert not MACHINE.search(text) and not NOISE.search(text)


def test_both_legs_of_ci_run_them():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("no checkout: .ci is not part of a source archive")
    text = script.read_text("utf-8")
    assert "jupyter-execute" in text and "tutorials/*.ipynb" in text
    checks = text.split("\nchecks() {")[1].split("\n}")[0]
    assert checks.endswith("\n  tutorials newest\n  tutorials pinned")
    assert "\nfinished checks\n" in text
