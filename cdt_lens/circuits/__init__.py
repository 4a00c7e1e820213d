"""Define head scores, circuits and graphs, and measure how faithful a circuit is.

m(C) is the metric of a model in which every head outside the circuit C is set to the baseline, with
all MLPs intact. The metric is the mean task direction in logits, or accuracy.

- Faithfulness: f(C) = (m(C) - m(empty)) / (m(full) - m(empty)). 1 is as good as the full model, and
  0 as good as no heads.
- CPR is the area under f over the circuit sizes of MIB (arXiv 2504.13151). More is better.
- CMD is the area under |1 - f| over the same sizes. 0 is best.

Scores are signed, in logits: a positive head pushes towards the gold label. Heads are ranked by the
signed score or by its magnitude, as the argument `by` says. By magnitude, a head that pushes
against the gold label ranks as high as one that pushes towards it.

See docs/method/circuits.md and docs/method/faithfulness.md.
"""
