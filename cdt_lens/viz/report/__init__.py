"""Render results as one self-contained HTML page that opens without a network.

The sections are in the order of the method. `report.py` renders the template with the sections that
the other modules build.
"""
