"""Define head scores, circuits and graphs, and measure how faithful a circuit is.

Each convention is stated here and computed once:

- Scores are signed, in logits: a positive head pushes towards the gold label.
- Order: heads are ranked by their signed score, the largest first, unless a call asks for
  `by="magnitude"`. This holds for rankings, selections, bars, curves and the greedy pool. Equal
  scores keep the order of layer and head. docs/results/methods.md compares the two orders.
- Size: a fraction of n heads is rounded down, as in MIB (`measures.heads_at`).
- Near zero: the heads of smallest magnitude outside a circuit (`circuit.near_zero_heads`).
- m(C) is the metric of a model in which every head outside the circuit C is set to the baseline,
  with all MLPs intact (`ablation`).
- Faithfulness: f(C) = (m(C) - m(empty)) / (m(full) - m(empty)). 1 is as good as the full model, and
  0 as good as the empty run: no heads and intact MLPs, or, as in MIB, neither heads nor MLPs nor
  input (`measures.EMPTY_RUNS`). Every result names its own.
- An edge is direct (what its source itself wrote, `edge_pass`) or stands for all paths between its
  ends. `Graph.direct` tells which; `edge_faithfulness` ablates direct edges.
- CPR is the area under f over the circuit sizes of MIB (arXiv 2504.13151). More is better. CMD is
  the area under |1 - f| over the same sizes. 0 is best (`measures`).

See docs/method/circuits.md and docs/method/faithfulness.md.
"""
