"""Methods of scoring heads, side by side."""
