"""Measures of faithfulness against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from cdt_lens.circuits import measures
from cdt_lens.circuits.measures import MIB_FRACTIONS
from cdt_lens.core.errors import InputError


def test_faithfulness_is_1_for_all_and_0_for_none():
    values = torch.tensor([2.0, -1.0, 0.5, 5.0, -4.0])
    f = measures.faithfulness(values, 2.0, -1.0)
    assert f.tolist() == [1.0, 0.0, 0.5, 2.0, -1.0]
    below = measures.faithfulness(torch.tensor([-3.0, 1.0]), -3.0, 1.0)  # heads that hurt
    assert below.tolist() == [1.0, 0.0]


def test_faithfulness_without_a_gap_is_refused():
    with pytest.raises(InputError, match="nothing to explain"):
        measures.faithfulness(torch.tensor([1.0]), 1.5, 1.5)


def test_cpr_and_cmd_are_trapezoids():
    fractions = (0.0, 0.1, 0.5, 1.0)
    f = torch.tensor([[0.0, 0.5, 2.0, 1.0], [0.2, 0.2, 0.2, 0.2]])
    cpr = [0.1 * 0.25 + 0.4 * 1.25 + 0.5 * 1.5, 0.2]
    cmd = [0.1 * 0.75 + 0.4 * 0.75 + 0.5 * 0.5, 0.8]
    assert measures.cpr(fractions, f).tolist() == pytest.approx(cpr)
    assert measures.cmd(fractions, f).tolist() == pytest.approx(cmd)


def test_the_areas_of_a_perfect_and_of_an_empty_curve():
    width = MIB_FRACTIONS[-1] - MIB_FRACTIONS[0]
    perfect, nothing = torch.ones(10), torch.zeros(10)
    assert float(measures.cpr(MIB_FRACTIONS, perfect)) == pytest.approx(width)
    assert float(measures.cmd(MIB_FRACTIONS, perfect)) == 0.0
    assert float(measures.cmd(MIB_FRACTIONS, nothing)) == pytest.approx(width)


def test_the_fractions_are_those_of_mib():
    assert MIB_FRACTIONS == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
