"""Carry the irrelevant stream through the model's own forward pass (method.md §3).

1. One ordinary run of a batch records what the rules will need.
2. A chunk of source sets becomes (source x example) rows; all start from the recorded residual
   stream at the earliest source layer, where irrelevant = full.
3. The rows go through the model's own blocks. Hooks put the rule in place of the plain step: the
   recorded scale for a norm's own, the bias share taken back after a linear map, the recorded
   pattern, the activation's secant, and at `hook_z` of a source head the baseline.
4. Decomposed attention needs no attention code: the hooks hand the model rel_q, rel_k and rel_v,
   so that what arrives at `hook_z` is rel_z = softmax(rel_q rel_k^T) rel_v by the model's own
   rotary embedding, grouping, scale, soft-cap and mask; the hook returns z - rel_z.
5. The end is read at each prompt's last token, for a few candidate tokens only.

Linear maps, rotary embeddings, grouped heads and gates need no code of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdt_lens import rules as rule
from cdt_lens.baselines import BaselineAt
from cdt_lens.errors import UnsupportedModelError
from cdt_lens.model import Hook, ModelView, Site, Trace
from cdt_lens.rules import Rules
from cdt_lens.support import Support, check_supported, output_site

# Where the baseline goes in: for each layer with sources, [source, batch or 1, pos or 1, head].
Resets = Mapping[int, Bool[Tensor, "source batch pos head"]]
# A rule at one site: the irrelevant part as the model computed it -> as the rule has it.
Step = Callable[[Tensor, Site], Tensor]


class Propagator:
    """One batch of prompts, ready to carry irrelevant streams for any source sets."""

    def __init__(
        self,
        view: ModelView,
        tokens: Int[Tensor, "batch pos"],
        lengths: Int[Tensor, " batch"],
        baseline: BaselineAt,
        rules: Rules,
        *,
        record: Sequence[Site] = (),
        record_rules: bool = True,
    ) -> None:
        self.view = view
        self.rules = rules
        self.support: Support = check_supported(view)
        self.baseline = baseline
        self._check_rules()
        self.trace: Trace = view.run(tokens, [*(self._needed() if record_rules else ()), *record])
        self.lengths = lengths.to(view.device)
        answer = self._at_answer(self.trace.resid[-1])
        self.final: dict[Site, Tensor] = {}
        names = [(f"{n}.{p}", view.n_layers) for n in view.norms(view.n_layers) for p in _PARTS]
        hooks: dict[Site, Hook] = {site: _keep(self.final, site) for site in names}
        self.normed = view.final_norm(answer, hooks)

    # ------------------------------------------------------------------ what the rules need

    def _check_rules(self) -> None:
        name = self.view.name
        frozen_mlp = self.rules.activation == "frozen" or self.rules.product == "half"
        has_mlp = {layer for site, layer in self.view.sites if site == "mlp_out"}
        if frozen_mlp and has_mlp - self.support.plain_mlp:
            raise UnsupportedModelError(
                f"{name}: the MLP is not act(x W_in) or act(x W_gate) * x W_in, so "
                "activation='frozen' and product='half' have no rule; use activation='through'"
            )
        if self.rules.norm == "frozen" and self.rules.bias == "proportional":
            for norm, layer in (("ln1_post", 0), ("ln2_post", 0)):
                if self._biased(f"{norm}.out", layer):
                    raise UnsupportedModelError(
                        f"{name}: {norm} has a bias, for which bias='proportional' has no rule "
                        "behind a projection; use bias='irrelevant'"
                    )
        if self.rules.sign and not any(site == "pre" for site, _ in self.view.sites) and has_mlp:
            raise UnsupportedModelError(
                f"{name}: the MLP has no hook point before its activation, where the sign rule "
                "applies; use sign=False"
            )

    def _biased(self, name: str, layer: int) -> bool:
        return self.rules.bias == "proportional" and (name, layer) in self.support.biases

    def _needed(self) -> list[Site]:
        """The sites that an ordinary run must record for these rules."""
        rules, sites = self.rules, []
        for layer in range(self.view.n_layers):
            for norm in self.view.norms(layer):
                if rules.norm == "frozen":
                    sites.append((f"{norm}.scale", layer))
                    if self._biased(f"{norm}.out", layer):
                        sites.append((f"{norm}.in", layer))
                if rules.attention == "decomposed" and norm in ("q_norm", "k_norm"):
                    sites.append((f"{norm}.out", layer))
            for name in ("q", "k", "v"):
                if rules.attention == "decomposed" or self._biased(name, layer):
                    sites.append((name, layer))
            sites.append(("z", layer))
            if rules.attention == "frozen":
                sites.append(("pattern", layer))
            outputs = [output_site(self.view, name, layer) for name in ("attn_out", "mlp_out")]
            mlp = [("pre", layer), ("pre_linear", layer), outputs[1]]
            if rules.sign:
                sites += [*mlp, ("resid_post", layer)]
            if rules.activation == "frozen" or rules.product == "half":
                sites += [("pre", layer), ("pre_linear", layer)]
            sites += [site for site in (outputs[0], *mlp) if self._biased(*site)]
        return [site for site in dict.fromkeys(sites) if site in self.view.sites]

    # ------------------------------------------------------------------ carrying the stream

    def propagate(
        self, resets: Resets, taps: Mapping[Site, Callable[[Tensor], None]] | None = None
    ) -> Float[Tensor, "source batch d_model"]:
        """Irrelevant final residual stream at each prompt's last token, before the final norm.

        taps: called with the irrelevant part `[source, batch, pos, ...]` at a site.
        """
        start = min(resets)
        n_sources = next(iter(resets.values())).shape[0]
        hooks = _Hooks(self, n_sources, start, resets, taps or {})
        resid = self.trace.resid[start].repeat(n_sources, 1, 1)
        out = self.view.replay(self.trace, resid, start, hooks.build())
        return self._at_answer(out.reshape(n_sources, *self.trace.resid[-1].shape))[:, :, 0]

    def candidate_logits(
        self, resid: Float[Tensor, "source batch d_model"], candidates: Int[Tensor, "batch k"]
    ) -> Float[Tensor, "source batch k"]:
        """Irrelevant logits of candidate tokens from the irrelevant final residual stream."""
        view, rules, layer = self.view, self.rules, self.view.n_layers
        n_sources, batch, _ = resid.shape
        rows = resid.reshape(n_sources * batch, 1, -1)
        hooks: dict[Site, Hook] = {}
        if rules.norm == "frozen":
            for norm in view.norms(layer):
                hooks |= self.norm_hooks(norm, layer, n_sources, self.final)
        normed = view.final_norm(rows, hooks).reshape(n_sources, batch, -1)
        columns, bias = view.unembedding(candidates)
        irrel = torch.einsum("sbd,bkd->sbk", normed, columns) + bias
        full = torch.einsum("bd,bkd->bk", self.normed[:, 0], columns) + bias
        if rules.bias == "proportional" and bool(bias.any()):
            irrel = rule.take_back_bias(irrel, full, bias, rules.eps)
        return self._softcap(irrel, full)

    def full_logits(self, candidates: Int[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
        """The plain model's logits of candidate tokens at each prompt's last token."""
        columns, bias = self.view.unembedding(candidates)
        logits = torch.einsum("bd,bkd->bk", self.normed[:, 0], columns) + bias
        cap = self.view.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _softcap(self, irrel: Tensor, full: Tensor) -> Tensor:
        cap = self.view.logit_softcap
        if cap is None:
            return irrel
        if self.rules.activation == "frozen":
            return irrel * rule.secant(lambda x: cap * torch.tanh(x / cap), full)
        return cap * torch.tanh(irrel / cap)

    def _at_answer(self, resid: Float[Tensor, "*rows batch pos d"]) -> Tensor:
        """`[..., batch, 1, d_model]` at the last real token of each prompt."""
        rows = torch.arange(resid.shape[-3], device=resid.device)
        return resid[..., rows, self.lengths.to(resid.device) - 1, :].unsqueeze(-2)

    def norm_hooks(
        self, norm: str, layer: int, n_sources: int, full: Mapping[Site, Tensor] | Trace
    ) -> dict[Site, Hook]:
        """Hooks that make `norm` divide by the recorded scale and share out its bias."""
        scale = full[f"{norm}.scale", layer]

        def divide_by_recorded(value: Tensor) -> Tensor:
            return scale.expand(n_sources, *scale.shape).reshape(value.shape)

        hooks: dict[Site, Hook] = {(f"{norm}.scale", layer): divide_by_recorded}
        if not self._biased(f"{norm}.out", layer):
            return hooks
        bias = self.support.biases[f"{norm}.out", layer]
        whole = full[f"{norm}.in", layer]
        memory: dict[str, Tensor] = {}

        def note_input(value: Tensor) -> None:
            # HookedTransformer calls the first norm three times with the same tensor.
            if memory.get("in") is not value:
                memory["in"] = value
                parts = value.reshape(n_sources, *whole.shape)
                memory["share"] = rule.norm_bias_share(parts, whole, bias, self.rules.eps)

        def take_back(value: Tensor) -> Tensor:
            return value - memory["share"].reshape(value.shape)

        hooks[f"{norm}.in", layer] = note_input
        hooks[f"{norm}.out", layer] = take_back
        return hooks


_PARTS = ("in", "scale", "out")


class _Hooks:
    """The hooks of one replay: the rules of each step, for `n_sources` copies of the batch."""

    def __init__(
        self,
        owner: Propagator,
        n_sources: int,
        start: int,
        resets: Resets,
        taps: Mapping[Site, Callable[[Tensor], None]],
    ) -> None:
        self.owner, self.rules, self.trace = owner, owner.rules, owner.trace
        self.n_sources, self.start, self.resets, self.taps = n_sources, start, resets, taps
        self.hooks: dict[Site, Hook] = {}

    def build(self) -> dict[Site, Hook]:
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
        return self.hooks

    def _put(self, site: Site, step: Step, handed_over: bool = False) -> None:
        """Hook `site`: see the rows as [source, batch, ...], apply a rule, feed the tap.

        handed_over: give the model the relevant part from here on, as decomposed attention needs.
        """
        if site not in self.owner.view.sites:
            return
        tap = self.taps.get(site)

        def hook(value: Tensor) -> Tensor:
            result = step(value.reshape(self.n_sources, -1, *value.shape[1:]), site)
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
                self.hooks |= self.owner.norm_hooks(norm, layer, self.n_sources, self.trace)

    # ------------------------------------------------------------------ attention

    def _attention(self, layer: int) -> None:
        self._norms(layer, ("q_norm", "k_norm"))
        decomposed = self.rules.attention == "decomposed"
        for name in ("q", "k", "v"):
            # With a norm on q and k, the relevant part is handed over after that norm.
            normed = (f"{name}_norm.out", layer) in self.owner.view.sites
            if decomposed or self.owner._biased(name, layer):
                self._put((name, layer), self._linear, handed_over=decomposed and not normed)
            if decomposed and normed:
                self._hand_over_after_norm(f"{name}_norm.out", layer)
        if self.rules.attention == "frozen":
            self._put(("pattern", layer), self._recorded_pattern)

    def _hand_over_after_norm(self, name: str, layer: int) -> None:
        full = self.trace[name, layer]
        after = self.hooks.get((name, layer))

        def hook(value: Tensor) -> Tensor:
            irrel = value if after is None else after(value)
            return (full - irrel.reshape(self.n_sources, *full.shape)).reshape(value.shape)

        self.hooks[name, layer] = hook

    def _recorded_pattern(self, value: Tensor, site: Site) -> Tensor:
        return self.trace[site].expand(value.shape)

    def _z(self, layer: int) -> None:
        reset = self.resets.get(layer)
        decomposed = self.rules.attention == "decomposed" and layer > self.start
        if reset is None and not decomposed and ("z", layer) not in self.taps:
            return
        baseline = None if reset is None else self.owner.baseline(layer)

        def step(value: Tensor, site: Site) -> Tensor:
            if layer == self.start:
                value = self.trace[site].expand(value.shape)
            elif decomposed:
                value = self.trace[site] - value
            if reset is None or baseline is None:
                return value
            return torch.where(reset.unsqueeze(-1), baseline.to(value.dtype), value)

        self._put(("z", layer), step)

    # ------------------------------------------------------------------ linear maps and the MLP

    def _linear(self, value: Tensor, site: Site) -> Tensor:
        if self.owner._biased(*site):
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
        if self.owner._biased(*attn_out):
            self._put(attn_out, self._linear)
        by_formula = self.rules.activation == "frozen" or self.rules.product == "half"
        kept: dict[str, Tensor] = {}

        def keep(value: Tensor, site: Site) -> Tensor:
            value = self._linear_and_sign(value, site)
            kept[site[0]] = value
            return value

        for name in ("pre", "pre_linear"):
            if by_formula or self.rules.sign or self.owner._biased(name, layer):
                self._put((name, layer), keep if by_formula else self._linear_and_sign)
        if by_formula:
            self._put(("post", layer), lambda _value, site: self._activated(kept, site[1]))
        if self.rules.sign or self.owner._biased(*mlp_out):
            self._put(mlp_out, self._linear_and_sign)
        if self.rules.sign and ("mlp_out", layer) in self.owner.view.sites:
            self._put(
                ("resid_post", layer), lambda v, site: rule.larger_takes_all(v, self.trace[site])
            )

    def _activated(self, irrel: Mapping[str, Tensor], layer: int) -> Tensor:
        """Irrelevant part after the activation, and after the product of a gated MLP."""
        function = self.owner.view.activation(layer)
        if function is None:
            raise UnsupportedModelError(f"{self.owner.view.name}: layer {layer} has no activation")
        full = self.trace["pre", layer]
        if self.rules.activation == "frozen":
            activated = irrel["pre"] * rule.secant(function, full)
        else:
            activated = function(irrel["pre"])
        if "pre_linear" not in irrel:
            return activated
        return rule.gated_product(
            activated,
            irrel["pre_linear"],
            function(full),
            self.trace["pre_linear", layer],
            self.rules.product,
        )


def _keep(memory: dict[Site, Tensor], site: Site) -> Hook:
    def hook(value: Tensor) -> None:
        memory[site] = value.detach()

    return hook
