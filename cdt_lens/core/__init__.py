"""Provide what every folder uses: errors, artefact files, kept results, processes and display.

This folder knows no model and imports nothing else of the package.
"""
