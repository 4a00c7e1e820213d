"""Every way to score heads and edges: signed, in logits, positive towards the gold label.

| function | cost per batch | what it computes |
|---|---|---|
| `exact_ablation` | one forward pass per head | the exact effect of mean-ablating the head |
| `score_heads` | one forward pass per head (two with context="both") | contextual decomposition |
| `one_pass` | one forward and backward pass | the decomposition to first order |
| `attribution_patching` | one forward and backward pass | exact ablation to first order |
| `integrated_gradients` | five forward and backward passes | gradients averaged over a path |
| `direct_attribution` | one forward and backward pass | what the head writes to the logits |
| `random_scores` | one forward pass | nothing: the floor of a comparison |
| `score_edges` | about four sweeps of `score_heads` | edges between heads, MLPs and the logits |

docs/results/methods.md compares them. `score_heads` with its default rules is the first choice, and
`exact_ablation` the yardstick.
"""
