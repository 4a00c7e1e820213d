"""Killed at random moments, a transfer resumes to the bytes of an unkilled one, without litter."""

from __future__ import annotations

import random
from pathlib import Path

from helpers.kills import Place, complaint, moments


def test_a_killed_transfer_resumes_to_the_same_bytes(tmp_path: Path):
    """Two kills of one run; `benchmarks/kills.py` makes fifty and more."""
    place = Place(tmp_path / "place")
    expected, seconds = place.finish()
    assert "cells/near/decision-0.json" in expected and not place.litter()
    at = sorted(moments(random.Random(0), seconds, 2))
    assert complaint(place, expected, at) == ""
