"""Contextual decomposition (CD-T, arXiv 2407.00886)."""
