"""Compare methods of scoring heads.

In a comparison, all methods have the same model, weights, task, scored examples, held-out examples,
baseline, direction, batch size, circuit sizes and random controls. Only the method differs. Costs
are multiples of a plain forward pass on the same examples, timed in the same run. See
docs/method/comparing.md.
"""
