"""The rules as hooks at the sites that the irrelevant streams pass through.

`RuleHooks` builds the hooks of one replay for many source sets at once. Each hook sees the rows as
[source, batch, ...] and replaces the plain step by a function of `rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Bool
from torch import Tensor

from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.decomposition import rules as rule
from cdt_lens.decomposition.baseline import BaselineAt
from cdt_lens.decomposition.rules import Rules
from cdt_lens.models.sites import Hook, Site
from cdt_lens.models.support import Support, output_site
from cdt_lens.models.trace import Trace
from cdt_lens.models.view import ModelView

# Heads that take their baseline, by layer: [source, batch or 1, pos or 1, head].
Resets = Mapping[int, Bool[Tensor, "source _batch _pos head"]]
# Source sets in which the MLP's output takes its baseline, by layer.
MlpResets = Mapping[int, Bool[Tensor, " source"]]
# A rule at one site: from the irrelevant part that the model computed to that of the rule.
Step = Callable[[Tensor, Site], Tensor]
# Called with the irrelevant part [source, batch, pos, ...] at a site.
Tap = Callable[[Tensor], None]


@runtime_checkable
class Run(Protocol):
    """The run that the hooks belong to, as far as they use it (`propagate.Propagator`)."""

    view: ModelView
    rules: Rules
    support: Support
    trace: Trace
    baseline: BaselineAt
    mlp_baseline: BaselineAt

    def biased(self, name: str, layer: int) -> bool:
        """Return whether the rules share out a bias at this site."""
        ...


def norm_hooks(
    run: Run, norm: str, layer: int, n_sources: int, full: Mapping[Site, Tensor] | Trace
) -> dict[Site, Hook]:
    """Build the hooks that make a norm divide by its recorded scale and share out its bias.

    Args:
        run: The run that the hooks belong to.
        norm: Name of the norm, such as "ln1".
        layer: Layer of the norm; `n_layers` for the final norm.
        n_sources: Number of source sets.
        full: Activations of the ordinary run.

    Returns:
        The hooks by site.
    """
    scale = full[f"{norm}.scale", layer]

    def divide_by_recorded(value: Tensor) -> Tensor:
        return scale.expand(n_sources, *scale.shape).reshape(value.shape)

    hooks: dict[Site, Hook] = {(f"{norm}.scale", layer): divide_by_recorded}
    if not run.biased(f"{norm}.out", layer):
        return hooks
    bias = run.support.biases[f"{norm}.out", layer]
    whole = full[f"{norm}.in", layer]
    memory: dict[str, Tensor] = {}

    def note_input(value: Tensor) -> None:
        # HookedTransformer calls the first norm three times with the same tensor.
        if memory.get("in") is not value:
            memory["in"] = value
            parts = value.reshape(n_sources, *whole.shape)
            memory["share"] = rule.norm_bias_share(parts, whole, bias, run.rules.eps)

    def take_back(value: Tensor) -> Tensor:
        return value - memory["share"].reshape(value.shape)

    hooks[f"{norm}.in", layer] = note_input
    hooks[f"{norm}.out", layer] = take_back
    return hooks


def _then(first: Step | None, second: Step) -> Step:
    """Return one step that applies both rules, in this order."""
    if first is None:
        return second
    return lambda value, site: second(first(value, site), site)


class RuleHooks:
    """The hooks of one replay: the rules of each step, for `n_sources` copies of the batch.

    Args:
        owner: The run that the hooks belong to.
        n_sources: Number of source sets.
        start: First layer of the replay.
        resets: Heads that take their baseline.
        taps: Called once per replay with the irrelevant part at a site, after the site's rules.
        mlp_resets: MLPs that take their baseline.
    """

    def __init__(
        self,
        owner: Run,
        n_sources: int,
        start: int,
        resets: Resets,
        taps: Mapping[Site, Tap],
        mlp_resets: MlpResets,
    ) -> None:
        self.owner, self.rules, self.trace = owner, owner.rules, owner.trace
        self.n_sources, self.start, self.resets, self.taps = n_sources, start, resets, taps
        self.mlp_resets = mlp_resets
        self.hooks: dict[Site, Hook] = {}
        self._steps: dict[Site, Step] = {}
        self._shared: dict[int, Callable[[Tensor], Tensor]] = {}

    def build(self) -> dict[Site, Hook]:
        """Build the hooks by site."""
        for layer in range(self.start, self.owner.view.n_layers):
            # Up to z of the first source layer the irrelevant part is the full activation.
            if layer > self.start:
                self._norms(layer, ("ln1",))
                self._attention(layer)
            self._norms(layer, ("ln2", "ln1_post", "ln2_post"))
            self._z(layer)
            self._mlp(layer)
        for site in self.taps:
            if site not in self.hooks:
                self._put(site, lambda value, site: value)
        # The hooks refer to this object. A reference back would keep every activation that they
        # hold until Python's cycle collector runs.
        hooks, self.hooks, self._steps, self._shared = self.hooks, {}, {}, {}
        return hooks

    def _put(self, site: Site, step: Step, handed_over: bool = False) -> None:
        """Hook `site`: apply the rule to the rows as [source, batch, ...], then feed the tap once.

        Args:
            site: The site; one that the model does not have is left out.
            step: The rule. It follows the rules that the site has already.
            handed_over: Whether the model gets the relevant part from here on, as decomposed
                attention needs.
        """
        if site not in self.owner.view.sites:
            return
        tap = self.taps.get(site)
        chain = self._steps[site] = _then(self._steps.get(site), step)

        def hook(value: Tensor) -> Tensor:
            result = chain(value.reshape(self.n_sources, -1, *value.shape[1:]), site)
            if tap is not None:
                tap(result)
            if handed_over:
                result = self.trace[site] - result
            return result.reshape(value.shape)

        self.hooks[site] = hook

    def _norms(self, layer: int, names: tuple[str, ...]) -> None:
        if self.rules.norm != "frozen":
            return
        present = self.owner.view.norms(layer)
        for norm in names:
            if norm in present:
                self.hooks |= norm_hooks(self.owner, norm, layer, self.n_sources, self.trace)

    # ------------------------------------------------------------------ attention

    def _attention(self, layer: int) -> None:
        self._norms(layer, ("q_norm", "k_norm"))
        decomposed = self.rules.attention == "decomposed"
        for name in ("q", "k", "v"):
            # With a norm on q and k, the relevant part is handed over after that norm.
            normed = (f"{name}_norm.out", layer) in self.owner.view.sites
            if decomposed or self.owner.biased(name, layer):
                self._put((name, layer), self._linear, handed_over=decomposed and not normed)
            if decomposed and normed:
                self._hand_over_after_norm(f"{name}_norm.out", layer)
        if self.rules.attention == "frozen":
            self._put(("pattern", layer), self._recorded_pattern)
        if self.rules.attention == "half":
            self._share_pattern_and_values(layer)

    def _hand_over_after_norm(self, name: str, layer: int) -> None:
        full = self.trace[name, layer]
        after = self.hooks.get((name, layer))

        def hook(value: Tensor) -> Tensor:
            changed = None if after is None else after(value)
            irrel = value if changed is None else changed
            return (full - irrel.reshape(self.n_sources, *full.shape)).reshape(value.shape)

        self.hooks[name, layer] = hook

    def _share_pattern_and_values(self, layer: int) -> None:
        """Compute (A v_irrel + A_irrel v) / 2: the model adds the first term by itself.

        It computes A v_irrel because the hook gives it the recorded pattern A.
        """
        values = self.trace["v", layer]
        group = self.owner.view.n_heads // self.owner.view.n_kv_heads
        kept: dict[str, Tensor] = {}

        def swap(value: Tensor, site: Site) -> Tensor:
            kept["pattern"] = value
            return self._recorded_pattern(value, site)

        def share(value: Tensor) -> Tensor:
            ours = kept.pop("pattern").to(values.dtype)
            every = values.repeat_interleave(group, dim=2)
            moved = einsum(ours, every, "s b head q k, b k head d -> s b q head d")
            return (value + moved) / 2

        self._put(("pattern", layer), swap)
        self._shared[layer] = share

    def _recorded_pattern(self, value: Tensor, site: Site) -> Tensor:
        return self.trace[site].expand(value.shape)

    def _z(self, layer: int) -> None:
        reset = self.resets.get(layer)
        decomposed = self.rules.attention == "decomposed" and layer > self.start
        share = self._shared.get(layer)
        if reset is None and not decomposed and share is None and ("z", layer) not in self.taps:
            return
        baseline = None if reset is None else self.owner.baseline(layer)

        def step(value: Tensor, site: Site) -> Tensor:
            if layer == self.start:
                value = self.trace[site].expand(value.shape)
            elif decomposed:
                value = self.trace[site] - value
            elif share is not None:
                value = share(value)
            if reset is None or baseline is None:
                return value
            return torch.where(reset.unsqueeze(-1), baseline.to(value.dtype), value)

        self._put(("z", layer), step)

    # ------------------------------------------------------------------ linear maps and the MLP

    def _linear(self, value: Tensor, site: Site) -> Tensor:
        if self.owner.biased(*site):
            bias = self.owner.support.biases[site]
            value = rule.take_back_bias(value, self.trace[site], bias, self.rules.eps)
        return value

    def _linear_and_sign(self, value: Tensor, site: Site) -> Tensor:
        value = self._linear(value, site)
        return rule.larger_takes_all(value, self.trace[site]) if self.rules.sign else value

    def _mlp(self, layer: int) -> None:
        attn_out, mlp_out = (
            output_site(self.owner.view, name, layer) for name in ("attn_out", "mlp_out")
        )
        if self.owner.biased(*attn_out):
            self._put(attn_out, self._linear)
        by_formula = self.rules.mlp_by_formula
        kept: dict[str, Tensor] = {}

        def keep(value: Tensor, site: Site) -> Tensor:
            value = self._linear_and_sign(value, site)
            kept[site[0]] = value
            return value

        for name in ("pre", "pre_linear"):
            if by_formula or self.rules.sign or self.owner.biased(name, layer):
                self._put((name, layer), keep if by_formula else self._linear_and_sign)
        if by_formula:
            self._put(("post", layer), lambda _value, site: self._activated(kept, site[1]))
        if self.rules.sign or self.owner.biased(*mlp_out):
            self._put(mlp_out, self._linear_and_sign)
        if layer in self.mlp_resets:
            self._reset_mlp(layer)
        if self.rules.sign and ("mlp_out", layer) in self.owner.view.sites:
            self._put(
                ("resid_post", layer), lambda v, site: rule.larger_takes_all(v, self.trace[site])
            )

    def _reset_mlp(self, layer: int) -> None:
        """Put the baseline in place of the MLP's output, where the MLP is a source."""
        reset = self.mlp_resets[layer][:, None, None, None]
        baseline = self.owner.mlp_baseline(layer)

        def step(value: Tensor, site: Site) -> Tensor:
            return torch.where(reset, baseline.to(value.dtype), value)

        self._put(("mlp_out", layer), step)

    def _activated(self, irrel: Mapping[str, Tensor], layer: int) -> Tensor:
        """Compute the irrelevant part after the activation, or the product of a gated MLP."""
        function = self.owner.view.activation(layer)
        if function is None:
            raise UnsupportedModelError(f"{self.owner.view.name}: layer {layer} has no activation")
        full = self.trace["pre", layer]
        activated = rule.activated(function, irrel["pre"], full, self.rules.activation)
        if "pre_linear" not in irrel:
            return activated
        return rule.gated_product(
            activated,
            irrel["pre_linear"],
            function(full),
            self.trace["pre_linear", layer],
            self.rules.product,
        )
