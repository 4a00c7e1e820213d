"""Load a model and present both TransformerLens classes through one interface, `ModelView`.

This is the only folder that imports TransformerLens. The contract of `ModelView`:

1. `run` makes one ordinary forward pass and records the requested sites and every block's call.
2. `replay` sends any residual stream through the model's own blocks from a chosen layer on.
3. `candidate_logits` and `read_out` apply the model's own final norm, unembedding and soft-cap.
4. `sites`, `norms` and `hooked` name every activation alike for both classes and attach hooks.
5. Hooks, training mode, gradient flags and weights are as before after every call that returns or
   raises.
6. Prompts are padded on the right, so that padding never changes a number.

To add an architecture:

1. Load it with `load_model(..., backend="bridge")`. An architecture is supported when
   TransformerLens has the hook points of `sites.py` and `support.check_supported` accepts it.
2. If a hook point has another name, add it to `sites.py`. If a weight has another name, add it to
   `weights.py`.
3. If `HookedTransformer` reads the family correctly, add its Hugging Face class to
   `_HOOKED_FAMILIES` in `loading.py`.
4. Add a tiny model of the family to `tests/helpers/tiny_models.py`. The tests then compare it with
   the literal reference.
"""
