"""Every way to score heads and edges."""
