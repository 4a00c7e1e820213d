"""What every folder uses: errors, artefact files, kept results, processes, and how results show.

This folder knows no model and imports nothing of the package.
"""
