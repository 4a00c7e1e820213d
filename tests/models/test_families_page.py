"""The table of families in the documentation says what the code and the tests say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.shared import BRIDGE_OF_4, HOOKED_ONLY
from helpers.tiny_models import EXPERTS, FAMILIES, build

from cdt_lens.models.loading import _HOOKED_FAMILIES
from cdt_lens.models.support import _ROUTED_FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
_ROW = re.compile(r"^\| `(\w+)` \| (yes|no) \| (yes|no) \| (yes|no) \| (.*) \|$", re.M)
ROWS = {name: (rest[:3], rest[3]) for name, *rest in _ROW.findall(PAGE.read_text())}


def test_hooked_transformer_reads_the_classes_that_the_table_says():
    assert {name for name, (classes, _) in ROWS.items() if classes[0] == "yes"} == _HOOKED_FAMILIES


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_every_proved_family_is_in_the_table_with_its_bridges(family):
    model = build(family)
    (_, bridge_of_3, bridge_of_4), particulars = ROWS[type(model).__name__]
    assert (bridge_of_4 == "yes") == (family not in HOOKED_ONLY)
    assert (bridge_of_3 == "yes") == (family not in HOOKED_ONLY + BRIDGE_OF_4)
    assert (model.config.model_type in _ROUTED_FAMILIES) == ("experts" in particulars)


def test_the_table_has_no_class_without_a_test():
    assert {type(build(family)).__name__ for family in (*FAMILIES, *EXPERTS)} == ROWS.keys()
