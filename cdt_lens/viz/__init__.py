"""Draw figures, tables and circuitsvis widgets of the results.

Blue is positive, towards the gold label, and red is negative. A pattern or a sign repeats what a
colour says. Nothing is loaded from a network.
"""
