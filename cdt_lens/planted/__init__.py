"""Provide models whose circuit is known by construction, to test methods against.

Trained circuits (`trained_circuits.py`) probe noise and architecture. They recall a word's partner,
and all other heads have random output weights:

- `trained-gpt2`: LayerNorm, learned positions and an MLP.
- `trained-attention-only`: GPT-2 without its MLPs.
- `trained-llama`: RMSNorm, rotary positions, grouped keys and values, gated MLP.
- `trained-two-circuits`: two circuits at once, each used by half of the prompts.

In circuits that are built by hand (`hand_built_circuits.py`), each construction probes one way in
which heads share the work:

- `hand-cancellation`: two strong heads without a net effect beside the head that does the task.
- `hand-duplication`: three equal heads with a third of the effect each.
- `hand-or`: either of two heads suffices, so that removing one has no effect.
- `hand-and`: two heads are needed, so that adding one to an empty model has no effect.
- `hand-gated-and`: a gated MLP multiplies two heads that say nothing alone.
- `hand-composition`: a head acts only through the attention pattern of another.
- `hand-backup`: a head acts only where another does not.
- `hand-dead`: one head among heads that vary without effect or write a constant.

`catalogue.py` loads them by name, and `hand_built.py` sets the weights.
"""
