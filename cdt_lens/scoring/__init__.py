"""Score heads and edges by every method.

The cost of scoring `n` heads is given in passes for each batch, where a sweep starts each pass at
the head's own layer.

| method                 | passes                      | kind        | use                       |
|------------------------|-----------------------------|-------------|---------------------------|
| `exact`                | n forward                   | exact       | yardstick                 |
| `estimate:two-ended`   | 2, 2, and a sweep of a few  | rules       | default, sees redundancy  |
| `cdt:two-ended`        | 2n forward                  | rules       | sees redundancy           |
| `cdt:<other rules>`    | n forward                   | rules       | direct and indirect parts |
| `one-pass`             | 1 forward, 1 backward       | first order | speed                     |
| `one-pass:two-ended`   | 2 forward, 2 backward       | first order | speed, sees redundancy    |
| `attribution-patching` | 1 forward, 1 backward       | first order | comparison                |
| `integrated-gradients` | 6 forward, 5 backward       | first order | speed, sees redundancy    |
| `expected-gradients`   | 10 forward, 5 backward      | first order | comparison                |
| `replay:two-ended`     | 2 and a block a head, 2     | mixed       | near-exact removal        |
| `ensemble`             | 8 forward, 8 backward       | first order | comparison                |
| `gates`                | 23 forward, 22 backward     | learned     | circuits of every size    |
| `direct`               | 1 forward, 1 backward       | exact       | direct effect only        |
| `random`               | 1 forward                   | -           | lower bound               |

`estimate:two-ended` is what `score_heads` does by default: first-order scores of all examples, and
exact sweeps of a sample of them. `one-pass` also takes other slopes, such as `one-pass:linear`. All
scores are signed, in logits, with the same task and baseline. `cdt:two-ended` and
`integrated-gradients` find every planted circuit (docs/results/methods.md). See
docs/method/scores.md for the formulas, `edge_scores.py` and `iterative.py` for edges of all paths
(CD-T, arXiv 2407.00886, section 3.3), `direct_edges.py` for direct edges (EAP-IG, arXiv
2403.17806), and `agreement.py` to compare scores.
"""
