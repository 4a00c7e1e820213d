"""Carry the irrelevant stream through the model's own forward pass (docs/method/decomposition.md).

1. One ordinary run of a batch records what the rules need.
2. A chunk of source sets becomes (source x example) rows. All rows start from the recorded residual
   stream at the earliest source layer, where irrelevant = full.
3. The rows pass through the model's own blocks. Hooks replace a plain step by its rule: they use
   the recorded scale of a norm, subtract the relevant share of a bias after a linear map, use the
   recorded pattern or the activation's secant, and set z of a source head to the baseline.
4. Decomposed attention needs no attention code. The hooks pass rel_q, rel_k and rel_v to the model,
   so that rel_z = softmax(rel_q rel_k^T) rel_v arrives at `hook_z`, computed with the model's own
   rotary embedding, grouping, scale, soft-cap and mask. The hook returns z - rel_z.
5. The result is read at each prompt's last token, for a few candidate tokens only.

Linear maps, rotary embeddings, grouped heads and gates need no code in this package. The rules are
those of CD-T, arXiv 2407.00886, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.decomposition import rules as rule
from cdt_lens.decomposition.baseline import BaselineAt, no_mlp_baseline
from cdt_lens.decomposition.hooks import MlpResets, Resets, RuleHooks, Tap, norm_hooks
from cdt_lens.decomposition.rules import Rules
from cdt_lens.models.sites import Hook, Site
from cdt_lens.models.support import Support, check_caller_hooks, check_supported, output_site
from cdt_lens.models.trace import Trace
from cdt_lens.models.view import ModelView, at_answer
from cdt_lens.models.words import Candidates, in_parts, scores_of


class Propagator:
    """A recorded batch of prompts that carries the irrelevant streams of source sets.

    Args:
        view: the model.
        tokens: the prompts, padded on the right.
        lengths: number of real tokens of each prompt.
        baseline: the reference values of z, a function of the layer.
        rules: the propagation rules.
        candidates: the candidates that will be read, which words of several tokens need.
        record: further sites to record in the ordinary run.
        mlp_baseline: the reference values of MLP outputs, a function of the layer. MLPs as sources
            need it.

    Raises:
        UnsupportedModelError: a component of the model has no rule.
        InputError: the caller's hooks cannot be followed under these rules.
    """

    def __init__(
        self,
        view: ModelView,
        tokens: Int[Tensor, "batch pos"],
        lengths: Int[Tensor, " batch"],
        baseline: BaselineAt,
        rules: Rules,
        *,
        candidates: Candidates | None = None,
        record: Sequence[Site] = (),
        mlp_baseline: BaselineAt = no_mlp_baseline,
    ) -> None:
        self.view = view
        self.rules = rules
        self.support: Support = check_supported(view)
        self.baseline = baseline
        self.mlp_baseline = mlp_baseline
        self._check_rules()
        self.trace: Trace = view.run(tokens, [*self._needed(), *record])
        self.lengths = lengths.to(view.device)
        check_caller_hooks(view, tokens, lengths, edits=self._not_followed())
        self.candidates = candidates
        answer = at_answer(self.trace.resid[-1], self.lengths, candidates)
        self.final: dict[Site, Tensor] = {}
        names = [(f"{n}.{p}", view.n_layers) for n in view.norms(view.n_layers) for p in _PARTS]
        hooks: dict[Site, Hook] = {site: _keep(self.final, site) for site in names}
        with view.quiet(), view.hooked(hooks):
            self.normed = view.normed(answer)

    # ------------------------------------------------------------------ what the rules need

    def _check_rules(self) -> None:
        """Refuse rules that this model's MLPs and norms do not support."""
        name = self.view.name
        has_mlp = {layer for site, layer in self.view.sites if site == "mlp_out"}
        if self.rules.mlp_by_formula and has_mlp - self.support.plain_mlp:
            raise UnsupportedModelError(
                f"{name}: the MLP is not act(x W_in) or act(x W_gate) * x W_in, so only "
                "activation='through' with product='through' has a rule"
            )
        if self.rules.norm == "frozen" or self.rules.bias == "proportional":
            kept = f"norm={self.rules.norm!r} with bias={self.rules.bias!r}"
            moves = () if self.rules.attention == "frozen" else ("attention",)
            self.support.check_norms(name, ("mlp", *moves), kept)
        if self.rules.attention == "decomposed":
            self.support.check_norms(name, ("attention",), "attention='decomposed'")
        if self.rules.norm == "frozen" and self.rules.bias == "proportional":
            for norm, layer in (("ln1_post", 0), ("ln2_post", 0)):
                if self.biased(f"{norm}.out", layer):
                    raise UnsupportedModelError(
                        f"{name}: {norm} has a bias, and bias='proportional' has no rule for a "
                        "norm behind a projection; use bias='irrelevant'"
                    )
        if self.rules.sign and has_mlp - {
            layer for site, layer in self.view.sites if site == "pre"
        }:
            raise UnsupportedModelError(
                f"{name}: the MLP has no hook point before its activation, where the sign rule "
                "applies; use sign=False"
            )

    def _not_followed(self) -> str | None:
        """Name the rule under which a caller's edit cannot be followed, or return None."""
        if self.rules.attention in ("decomposed", "half"):
            return f"attention={self.rules.attention!r}"
        return "a rule for the MLP by formula" if self.rules.mlp_by_formula else None

    def biased(self, name: str, layer: int) -> bool:
        """Return whether the rules split a bias at this site.

        Args:
            name: name of the site.
            layer: layer of the site.

        Returns:
            True where `bias="proportional"` and the site has a bias that is not 0.
        """
        return self.rules.bias == "proportional" and (name, layer) in self.support.biases

    def _needed(self) -> list[Site]:
        """Return the sites that the ordinary run must record for these rules."""
        rules, sites = self.rules, []
        for layer in range(self.view.n_layers):
            for norm in self.view.norms(layer):
                if rules.norm == "frozen":
                    sites.append((f"{norm}.scale", layer))
                    if self.biased(f"{norm}.out", layer):
                        sites.append((f"{norm}.in", layer))
                if rules.attention == "decomposed" and norm in ("q_norm", "k_norm"):
                    sites.append((f"{norm}.out", layer))
            for name in ("q", "k", "v"):
                if rules.attention == "decomposed" or self.biased(name, layer):
                    sites.append((name, layer))
            sites.append(("z", layer))
            if rules.attention in ("frozen", "half"):
                sites.append(("pattern", layer))
            if rules.attention == "half":
                sites.append(("v", layer))
            outputs = [output_site(self.view, name, layer) for name in ("attn_out", "mlp_out")]
            mlp = [("pre", layer), ("pre_linear", layer), outputs[1]]
            if rules.sign:
                sites += [*mlp, ("resid_post", layer)]
            if rules.mlp_by_formula:
                sites += [("pre", layer), ("pre_linear", layer)]
            sites += [site for site in (outputs[0], *mlp) if self.biased(*site)]
        return [site for site in dict.fromkeys(sites) if site in self.view.sites]

    # ------------------------------------------------------------------ carrying the stream

    def propagate(
        self,
        resets: Resets,
        taps: Mapping[Site, Tap] | None = None,
        mlp_resets: MlpResets | None = None,
    ) -> Float[Tensor, "source _read d_model"]:
        """Compute the irrelevant stream at each prompt's last token, before the final norm.

        Args:
            resets: where the baseline replaces z, see `decompose.build_resets`.
            taps: functions that receive the irrelevant part `[source, batch, pos, ...]` at a site.
            mlp_resets: which source sets contain the MLP of a layer.

        Returns:
            The irrelevant part of the final residual stream.
        """
        return at_answer(self.carried(resets, taps, mlp_resets), self.lengths, self.candidates)

    def carried(
        self,
        resets: Resets,
        taps: Mapping[Site, Tap] | None = None,
        mlp_resets: MlpResets | None = None,
        stop: int | None = None,
    ) -> Float[Tensor, "source batch pos d_model"]:
        """Compute the irrelevant stream at every position, before a block.

        Args:
            resets: as for `propagate`.
            taps: as for `propagate`.
            mlp_resets: as for `propagate`.
            stop: the block to stop before. None runs all blocks.

        Returns:
            The irrelevant part of the residual stream.
        """
        mlp_resets = mlp_resets or {}
        start = min([*resets, *mlp_resets])
        n_sources = next(iter([*resets.values(), *mlp_resets.values()])).shape[0]
        hooks = RuleHooks(self, n_sources, start, resets, taps or {}, mlp_resets)
        resid = self.trace.resid[start].repeat(n_sources, 1, 1)
        out = self.view.replay(self.trace, resid, start, hooks.build(), stop)
        return out.reshape(n_sources, *self.trace.resid[-1].shape)

    def candidate_logits(
        self, resid: Float[Tensor, "source _read d_model"], candidates: Candidates
    ) -> Float[Tensor, "source batch k"]:
        """Compute the irrelevant logits of candidate tokens, or the irrelevant scores of words.

        The log-probabilities of words are those of the irrelevant logits, as an activation is
        applied to its irrelevant part.

        Args:
            resid: the irrelevant final residual stream, as `propagate` returns it.
            candidates: the candidates of each example.

        Returns:
            The irrelevant logits or scores, in at least float32.
        """

        def read(part: Tensor) -> Tensor:
            return scores_of(self._irrelevant_logits(part, candidates), candidates)

        return in_parts(read, resid, candidates, self.view.d_vocab)

    def _irrelevant_logits(
        self, resid: Float[Tensor, "source _read d_model"], candidates: Candidates
    ) -> Float[Tensor, "source _read _k"]:
        view, rules, layer = self.view, self.rules, self.view.n_layers
        hooks: dict[Site, Hook] = {}
        if rules.norm == "frozen":
            for norm in view.norms(layer):
                hooks |= norm_hooks(self, norm, layer, resid.shape[0], self.final)
        with view.quiet(), view.hooked(hooks):
            normed = view.normed(resid)
        irrel, full = view.unembedded(normed, candidates), view.unembedded(self.normed, candidates)
        _, bias = view.unembedding(candidates)
        if rules.bias == "proportional" and bool(bias.any()):
            irrel = rule.take_back_bias(irrel, full, bias.to(irrel.device), rules.eps)
        return self._softcap(irrel, full)

    def full_logits(self, candidates: Candidates) -> Float[Tensor, "batch k"]:
        """Compute the plain model's logits of candidate tokens at each prompt's last token.

        Args:
            candidates: the candidates of each example.

        Returns:
            Soft-capped logits, or the scores of words, in at least float32.
        """
        logits = self.view.softcapped(self.view.unembedded(self.normed, candidates))
        return scores_of(logits, candidates)

    def _softcap(self, irrel: Tensor, full: Tensor) -> Tensor:
        if self.view.logit_softcap is None:
            return irrel
        return rule.activated(self.view.softcapped, irrel, full, self.rules.activation)


_PARTS = ("in", "scale", "out")


def _keep(memory: dict[Site, Tensor], site: Site) -> Hook:
    def hook(value: Tensor) -> None:
        memory[site] = value.detach()

    return hook
