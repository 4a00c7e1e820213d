"""Figures, tables and circuitsvis widgets. Blue is positive, red is negative; no network."""
