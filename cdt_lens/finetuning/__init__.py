"""Adapt a model by training only a circuit's heads (CT-SFT, arXiv 2601.08146, section 3).

| scope                        | what is trained                                              |
|------------------------------|--------------------------------------------------------------|
| `decision`                   | the slices of the circuit's heads, and the norms             |
| `near-zero`                  | the same for as many heads of the smallest magnitude outside |
|                              | the circuit                                                  |
| `random`, `random-per-layer` | the same for as many random heads (in each layer)            |
| `norms`                      | the norms                                                    |
| `full`                       | every weight                                                 |
| `lora`                       | low-rank adapters on the q, k, v and output projections      |

A head's slices are its parts of W_Q, W_K, W_V, W_O, b_Q, b_K and b_V (docs/method/training.md). One
loop (`trainer.py`) trains every scope.

Bit-exactness: every element outside the scope keeps every bit, because the optimiser holds copies
of the trained elements and nothing else. `test_nothing_outside_the_scope_moves` in
tests/finetuning/test_finetune.py verifies it. An interrupted run resumes to the same bits, which
`test_a_killed_process_is_resumed_to_the_same_bits` verifies.
"""
