"""Head scores, circuits, graphs, and how faithful a circuit is.

Conventions, each stated and computed once:

- Order: heads are ranked by their signed score, the largest first, unless a call asks for
  `by="magnitude"`. This holds for rankings, selections, bars, curves and the greedy pool. Equal
  scores stand in order of layer and head. docs/results/methods.md compares the two orders.
- Size: a fraction of n heads is rounded down, as in MIB (`measures.heads_at`).
- Near zero: the heads of smallest magnitude outside a circuit (`circuit.near_zero_heads`).
- m(C) is the metric with every head outside C mean-ablated (`ablation`); f(C) is
  (m(C) - m(empty)) / (m(full) - m(empty)); CPR and CMD are the areas under f and |1 - f|
  (`measures`).
"""
