"""Split every activation into the contribution of chosen heads and the rest (CD-T).

Contextual decomposition (CD-T, arXiv 2407.00886, section 3) writes an activation of an ordinary run
as full = rel + irrel. `rel` is the contribution of a set of source heads. Only the irrelevant part
is carried through the network; everywhere, rel = full - irrel.

1. `rules.py` says how the irrelevant part passes each kind of step: linear maps, norms, attention,
   activations, gated products (section 3; docs/method/decomposition.md).
2. `baseline.py` computes the reference value that z of a source head is set to, a label-balanced
   mean where the paper uses a mean over the data (docs/method/baseline.md).
3. `propagate.py` carries the irrelevant stream of many source sets through the model's own blocks
   (section 3). `hooks.py` attaches the rules, `targets.py` collects the parts at target heads, and
   `empty_model.py` does the same in the model whose heads are all ablated.
4. `decompose.py` groups and chunks the source sets and returns the relevant part of the logits and
   of the task direction (section 3; docs/method/scores.md).
5. `slopes.py` and `gated_pass.py` compute the first-order form with one backward pass for all heads
   at once (docs/method/scores.md, "One pass"). This step is not in the paper.

Read the files in this order: `rules`, `baseline`, `propagate`, `hooks`, `decompose`, then
`targets`, `empty_model`, `slopes` and `gated_pass`.
"""
