"""Run a model in which each node may read an input of its own: the direct edges of EAP-IG.

An edge (u -> v) is the part of v's input that u wrote into the residual stream. v is the query, key
or value input of one head, the input of an MLP, or that of the logits; u is the token embedding, a
head or an MLP. The input is the one before v's norm.

1. An ordinary run of the batch records what every node writes. Position embeddings and the output
   bias of attention belong to no node, so they always stay.
2. Cutting (u -> v) adds (baseline of u - present output of u) to v's input and to nothing else.
3. Nodes compute from these inputs, so that the present output of a node behind a cut edge differs
   from that of the ordinary run. With every edge cut, each node reads baselines alone.
4. The blocks are the model's own. q, k and v of a layer are computed from the heads' inputs by the
   model's norm and weights, and hooks put them in place. Query heads that share grouped keys and
   values read them from inputs of their own: the block runs once for each member of a group, and
   each head keeps the z of its own run.

The meaning of a cut edge is that of EAP-IG (arXiv 2403.17806) and MIB (arXiv 2504.13151).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdt_lens.circuits.nodes import Site as EdgeSite, node_names, possible_edges, readers
from cdt_lens.core import display
from cdt_lens.core.errors import InputError, NonFiniteError, UnsupportedModelError
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.caller_hooks import caller_hooks
from cdt_lens.models.sites import Hook, Site
from cdt_lens.models.support import check_caller_hooks, check_embedding, check_supported, differ
from cdt_lens.models.view import ModelView, at_answer, at_least_float32
from cdt_lens.models.weights import check_gradients, named_weights
from cdt_lens.tasks.metrics import task_direction
from cdt_lens.tasks.task import Batch

Ends = tuple[str, str, EdgeSite]
# Called with the inputs of some readers, their columns, and the number of nodes that they read.
Probe = Callable[[Tensor, slice, int], None]
_SITES = ("q", "k", "v")
# Bytes of the outputs that the rows of one pass hold.
_BUDGET = 2**28


class EdgePass:
    """A recorded batch of prompts whose edges can be cut.

    Args:
        view: The model.
        batch: The prompts, on the model's device.
        baseline: The values that a cut edge carries.

    Raises:
        InputError: The baseline lacks the values of MLPs or embeddings, or the caller's hooks
            cannot be followed.
        UnsupportedModelError: The input of a head or MLP is no sum of what nodes wrote.
    """

    def __init__(self, view: ModelView, batch: Batch, baseline: Baseline) -> None:
        self.view, self.batch = view, batch
        check_supported(view)
        _refuse_post_norms(view)
        check_caller_hooks(view, batch.tokens, batch.lengths)
        self.mlps = frozenset(layer for name, layer in view.sites if name == "mlp_out")
        self._weights = named_weights(view)
        self._z_baseline = baseline.for_batch(view, batch)
        self._mlp_baseline = baseline.mlps_for_batch(view, batch) if self.mlps else None
        names = ("z", "mlp_out", "embed", "attn_out", "mlp.in", *_SITES)
        self.trace = view.run(batch.tokens, [site for site in view.sites if site[0] in names])
        _check_sums(self)
        embedding = baseline.embedding_for_batch(view, batch) - self.trace["embed", 0]
        parts = [embedding[None]]
        for layer in range(view.n_layers):
            parts.append(self.heads_away(layer, self.trace["z", layer])[0])
            out = self.trace.activations.get(("mlp_out", layer))
            out = torch.zeros_like(self.trace.resid[0]) if out is None else out
            parts.append(self.mlp_away(layer, out)[0])
        # Baseline minus output of every node in the ordinary run: [node, batch, pos, d_model].
        self.plain = torch.cat(parts)

    # ------------------------------------------------------------------ cut edges

    def rows_per_pass(self, rows: int | None) -> int:
        """Choose the number of sets of cut edges in one pass.

        Args:
            rows: Maximum number of (set x example) rows that the caller asked for. None bounds the
                memory of the nodes' outputs.
        """
        if rows is not None:
            return max(1, rows // len(self.batch.index))
        return max(1, _BUDGET // (self.plain.numel() * self.plain.element_size()))

    def full_logits(self) -> Float[Tensor, "batch k"]:
        """Compute the candidates' logits of the ordinary run."""
        with self.view.quiet():
            answer = at_answer(self.trace.resid[-1], self.batch.lengths)
            return self.view.candidate_logits(answer, self.batch.candidates)

    def logits(self, cut: Bool[Tensor, "set node reader"]) -> Float[Tensor, "set batch k"]:
        """Compute the candidates' logits with sets of edges cut.

        Args:
            cut: True at the edges that carry the baseline; nodes in the order of `node_names`,
                readers in that of `nodes.readers`.

        Returns:
            Soft-capped logits, in at least float32.

        Raises:
            NonFiniteError: A logit is not finite.
        """
        sets = len(cut)
        start = self._first_layer(cut)
        known = 1 + start * (self.view.n_heads + 1)
        away = self.plain.new_empty(sets, *self.plain.shape)
        away[:, :known] = self.plain[:known]
        resid = self.trace.resid[start].repeat(sets, 1, 1)
        with self.view.quiet():
            for layer in range(start, self.view.n_layers):
                resid = _Block(self, layer, away, cut).run(resid)
            answer = at_answer(self.by_set(resid), self.batch.lengths)
            changed = mixed(at_answer(away, self.batch.lengths), cut[..., -1:])
            logits = self.view.candidate_logits(answer + changed[:, 0], self.batch.candidates)
        # Without a cut edge the model is the full one to the last bit.
        logits[~cut.flatten(1).any(1)] = self.full_logits()
        return self._finite(logits)

    def _first_layer(self, cut: Tensor) -> int:
        """Return the first layer in which an edge is cut; `n_layers` where only the logits' are."""
        layers = cut[..., :-1].any(1).any(0).reshape(self.view.n_layers, -1).any(1)
        found = layers.nonzero()
        return int(found[0]) if len(found) else self.view.n_layers

    def _finite(self, logits: Tensor) -> Tensor:
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                f"{self.view.name}: logits are not finite with these edges cut; load the model in "
                "float32"
            )
        return logits

    # ------------------------------------------------------------------ gradients

    def attributions(
        self, points: Sequence[float]
    ) -> tuple[Float[Tensor, "batch node reader"], Float[Tensor, " batch"]]:
        """Compute <gradient at v's input, output of u - baseline of u> of every edge.

        Args:
            points: Where the token embedding stands between its baseline (0) and the prompt (1).
                The gradients are averaged over the points.

        Returns:
            The scores in logits, summed over positions; 0 where no edge is. Positive values push
            towards the gold label. Also the task direction of the ordinary run.

        Raises:
            InputError: The weights were created under `torch.inference_mode`, or a hook of the
                caller's detaches.
            NonFiniteError: A score is not finite.
        """
        check_gradients(self.view)
        n_readers = len(readers(self.view.n_layers, self.view.n_heads))
        total = at_least_float32(self.plain).new_zeros(
            len(self.batch.index), len(self.plain), n_readers
        )
        for point in points:
            self._add_gradients(point, total)
        full = task_direction(self.full_logits(), self.batch.direction)
        return self._finite(total / len(points)), full

    def _add_gradients(self, point: float, total: Float[Tensor, "batch node reader"]) -> None:
        plain = at_least_float32(self.plain)

        def probe(inputs: Tensor, columns: slice, known: int) -> None:
            def contract(gradient: Tensor) -> None:
                slope = at_least_float32(gradient[0])
                found = einsum(plain[:known], slope, "u b p d, r b p d -> b u r")
                total[:, :known, columns] -= found

            if not inputs.requires_grad:
                hooks = display.few(caller_hooks(self.view.tl))
                raise InputError(
                    f"{self.view.name}: no gradient passes your own hooks ({hooks}), which detach "
                    "what they return; remove them, or use ablate_edges"
                )
            inputs.register_hook(contract)

        lengths = self.batch.lengths.to(plain.device)
        with torch.enable_grad(), self.view.quiet(gradients=True):
            resid = (self.trace.resid[0] + (1 - point) * self.plain[0]).requires_grad_()
            first = resid
            for layer in range(self.view.n_layers):
                resid = _Block(self, layer, None, None, probe).run(resid)
            # A view of its own, so that the gradient is that of the logits' input alone.
            ends = resid[None, None]
            probe(ends, slice(total.shape[2] - 1, total.shape[2]), total.shape[1])
            logits = self.view.candidate_logits(
                at_answer(ends[0, 0], lengths), self.batch.candidates
            )
            torch.autograd.grad(task_direction(logits, self.batch.direction).sum(), first)

    # ------------------------------------------------------------------ nodes

    def weight(self, layer: int, name: str) -> Tensor:
        """Return a weight of attention such as "W_O", on the device of the view."""
        return self._weights[f"blocks.{layer}.attn.{name}"].to(self.view.device)

    def bias(self, layer: int, name: str) -> Tensor | float:
        """Return a bias of attention such as "b_O", or 0 if the model has none."""
        known = f"blocks.{layer}.attn.{name}" in self._weights
        return self.weight(layer, name) if known else 0.0

    def projected(
        self, layer: int, name: str, inputs: Float[Tensor, "set reader batch pos d_model"]
    ) -> Float[Tensor, "set_and_batch pos head d_head"]:
        """Compute q, k or v of every head of a layer, also of each that shares keys and values.

        Args:
            layer: The layer.
            name: "q", "k" or "v".
            inputs: The heads' inputs before the norm, or one input for all of them.
        """
        heads = self.view.n_heads
        weight = _of_each_head(self.weight(layer, f"W_{name.upper()}"), heads)
        bias = self.bias(layer, f"b_{name.upper()}")
        normed = self.view.normed_by("ln1", layer, inputs).expand(-1, heads, -1, -1, -1)
        out = einsum(normed, weight, "s h b p d, h d e -> s b p h e").flatten(0, 1)
        return out + (_of_each_head(bias, heads) if isinstance(bias, Tensor) else bias)

    def mlp_normed(
        self, layer: int, inputs: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "row pos d_model"]:
        """Apply the norm before a layer's MLP, which parallel blocks may share with attention."""
        norm = "ln2" if ("ln2.in", layer) in self.view.sites else "ln1"
        return self.view.normed_by(norm, layer, inputs)

    def heads_away(
        self, layer: int, z: Float[Tensor, "set_and_batch pos head d_head"]
    ) -> Float[Tensor, "set head batch pos d_model"]:
        """Compute what each head of a layer writes with its baseline z, minus what it writes.

        Args:
            layer: The layer.
            z: The heads' z; the rows are copies of the batch.
        """
        away = self._z_baseline(layer).to(z.dtype) - self.by_set(z)
        weight = self.weight(layer, "W_O")
        return einsum(away, weight, "s b p h e, h e d -> s h b p d")

    def mlp_away(
        self, layer: int, out: Float[Tensor, "set_and_batch pos d_model"]
    ) -> Float[Tensor, "set 1 batch pos d_model"]:
        """Compute the baseline of a layer's MLP, minus its output.

        Args:
            layer: The layer.
            out: The MLP's output; zeros in a model without MLPs. The rows are copies of the batch.
        """
        if self._mlp_baseline is None:
            return torch.zeros_like(self.by_set(out))[:, None]
        return (self._mlp_baseline(layer).to(out.dtype) - self.by_set(out))[:, None]

    def by_set(
        self, rows: Float[Tensor, "set_and_batch pos *more"]
    ) -> Float[Tensor, "set batch pos *more"]:
        """Split the rows of a pass into sets and examples."""
        return rows.unflatten(0, (-1, len(self.batch.index)))


class _Block:
    """One block, whose heads and MLP may read inputs of their own.

    Args:
        owner: The recorded batch.
        layer: The layer of the block.
        away: Baseline minus present output of every node, where the block fills in its own, or
            None if no edge is cut.
        cut: The cut edges, or None.
        probe: Called with the inputs of all readers.
    """

    def __init__(
        self,
        owner: EdgePass,
        layer: int,
        away: Float[Tensor, "set node batch pos d_model"] | None,
        cut: Bool[Tensor, "set node reader"] | None,
        probe: Probe | None = None,
    ) -> None:
        self.owner, self.layer, self.probe = owner, layer, probe
        self.view, self.cut = owner.view, cut
        self.away = away
        self.known = 1 + layer * (self.view.n_heads + 1)  # nodes that the heads read
        self.first = layer * (3 * self.view.n_heads + 1)  # the column of the first reader
        self.copies = 1
        self.hooks: dict[Site, Hook] = {}

    def run(self, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """Run the block.

        Args:
            resid: The sum of what all nodes wrote before the block.

        Returns:
            The sum behind the block.
        """
        self.resid, self.rows = resid, len(resid)
        self._put_projections()
        self.hooks["z", self.layer] = self._at_z
        if self.layer in self.owner.mlps:
            self.hooks["attn_out", self.layer] = self._at_attention_out
            self.hooks["mlp.in", self.layer] = self._at_mlp_in
            self.hooks["mlp_out", self.layer] = self._at_mlp_out
        with self.view.hooked(self.hooks):
            calls = self.owner.trace.calls[self.layer : self.layer + 1]
            out = self.view.through(resid.repeat(self.copies, 1, 1), calls, self.layer)[: self.rows]
        if self.layer not in self.owner.mlps:
            self._at_mlp_out(torch.zeros_like(out))
        return out

    def _inputs(self, resid: Tensor, columns: slice, *, beside: bool = False) -> Tensor:
        """Return the inputs of the readers in `columns`: [set, reader, batch, pos, d_model].

        Args:
            resid: The sum that the readers read where no edge is cut.
            columns: The readers.
            beside: Whether they read the heads of this layer too.
        """
        known = self.known + (self.view.n_heads if beside else 0)
        inputs = self.owner.by_set(resid)[:, None]
        if self.cut is not None and self.away is not None:
            return inputs + mixed(self.away[:, :known], self.cut[:, :known, columns])
        inputs = inputs.expand(-1, columns.stop - columns.start, -1, -1, -1)
        if self.probe is not None:
            self.probe(inputs, columns, known)
        return inputs

    def _is_read(self, columns: slice) -> bool:
        return self.probe is not None or bool(self.cut is not None and self.cut[..., columns].any())

    def _put_projections(self) -> None:
        heads = self.view.n_heads
        found: dict[str, Tensor] = {}
        for place, name in enumerate(_SITES):
            columns = slice(self.first + place * heads, self.first + (place + 1) * heads)
            if self._is_read(columns):
                inputs = self._inputs(self.resid, columns)
                found[name] = self.owner.projected(self.layer, name, inputs)
        group = heads // self.view.n_kv_heads
        self.copies = group if found.keys() & {"k", "v"} else 1
        if "q" in found:
            self._put("q", found.pop("q").repeat(self.copies, 1, 1, 1))
        for name, value in found.items():
            # Copy m of the rows holds the keys and values of member m of every group.
            self._put(name, rearrange(value, "r p (j m) e -> (m r) p j e", m=group))

    def _put(self, name: str, value: Tensor) -> None:
        self.hooks[name, self.layer] = lambda _: value

    def _at_z(self, value: Tensor) -> Tensor | None:
        z = value
        if self.copies > 1:
            copies = value.unflatten(0, (self.copies, -1))
            own = [copies[h % self.copies, :, :, h] for h in range(self.view.n_heads)]
            z = torch.stack(own, dim=2)
        if self.away is not None:
            heads = slice(self.known, self.known + self.view.n_heads)
            self.away[:, heads] = self.owner.heads_away(self.layer, z)
        return z.repeat(self.copies, 1, 1, 1) if self.copies > 1 else None

    def _at_attention_out(self, value: Tensor) -> None:
        self.read_by_mlp = self.resid if self.view.parallel else self.resid + value[: self.rows]

    def _at_mlp_in(self, value: Tensor) -> Tensor | None:
        column = self.first + 3 * self.view.n_heads
        columns = slice(column, column + 1)
        if not self._is_read(columns):
            return None
        inputs = self._inputs(self.read_by_mlp, columns, beside=not self.view.parallel)
        normed = self.owner.mlp_normed(self.layer, inputs[:, 0].flatten(0, 1))
        return normed.repeat(self.copies, 1, 1)

    def _at_mlp_out(self, value: Tensor) -> None:
        if self.away is not None:
            place = self.known + self.view.n_heads
            away = self.owner.mlp_away(self.layer, value[: self.rows])
            self.away[:, place : place + 1] = away


def mixed(
    away: Float[Tensor, "set node *shape"], cut: Bool[Tensor, "set node reader"]
) -> Float[Tensor, "set reader *shape"]:
    """Sum what cut edges change in their readers' inputs.

    Args:
        away: Baseline minus present output of some nodes.
        cut: The cut edges between these nodes and the readers.
    """
    summed = torch.bmm(cut.mT.to(away), away.flatten(2))
    return summed.unflatten(2, away.shape[2:])


def edges_of(view: ModelView) -> tuple[Ends, ...]:
    """Return source, target and site of every edge of a model, in the order of `possible_edges`.

    Args:
        view: The model. Edges of MLPs that it does not have are left out.
    """
    missing = {f"M{n}" for n in range(view.n_layers) if ("mlp_out", n) not in view.sites}
    found = possible_edges(view.n_layers, view.n_heads, parallel=view.parallel)
    return tuple(ends for ends in found if not missing & set(ends[:2]))


def places_of(
    edges: Sequence[Ends], n_layers: int, n_heads: int
) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
    """Return the places of edges in a table [node, reader].

    Args:
        edges: Source, target and site of each edge.
        n_layers: Number of layers of the model.
        n_heads: Number of heads per layer.

    Returns:
        The rows, in the order of `node_names`, and the columns, in that of `readers`.
    """
    row = {name: n for n, name in enumerate(node_names(n_layers, n_heads))}
    column = {ends: n for n, ends in enumerate(readers(n_layers, n_heads))}
    rows = [row[source] for source, _, _ in edges]
    return torch.tensor(rows), torch.tensor([column[ends[1:]] for ends in edges])


def _of_each_head(weight: Tensor, heads: int) -> Tensor:
    """Repeat grouped weights [group, ...] for the query heads that share them."""
    return weight.repeat_interleave(heads // len(weight), 0)


def _refuse_post_norms(view: ModelView) -> None:
    for norm in ("ln1_post", "ln2_post"):
        if norm in view.norms(0):
            raise UnsupportedModelError(
                f"{view.name}: the norm {norm} behind attention or MLP (Gemma 2 and 3): what a "
                "head writes is no term of a sum there, so no edge can be cut alone; use "
                "score_edges, or the faithfulness of heads"
            )


def _check_sums(run: EdgePass) -> None:
    """Check that what nodes read is computed from the sum of what nodes wrote, as here."""
    view, trace = run.view, run.trace
    check_embedding(view, trace)
    for layer in range(view.n_layers):
        _check_attention(run, layer)
        if layer in run.mlps:
            attention = 0.0 if view.parallel else trace["attn_out", layer]
            inputs = run.mlp_normed(layer, trace.resid[layer] + attention)
            if differ(inputs, trace["mlp.in", layer], view.dtype):
                _refuse(view, f"layer {layer}'s MLP, which reads no normed sum")


def _check_attention(run: EdgePass, layer: int) -> None:
    view, trace = run.view, run.trace
    written = einsum(trace["z", layer], run.weight(layer, "W_O"), "r p h e, h e d -> r p d")
    if differ(written + run.bias(layer, "b_O"), trace["attn_out", layer], view.dtype):
        _refuse(view, f"layer {layer}'s attention, whose output is no sum over heads")
    for norm in {"q_norm", "k_norm"} & set(view.norms(layer)):
        if (view.norm_width(norm, layer) or 0) > view.d_head:
            _refuse(view, f"layer {layer}'s {norm}, which norms all heads together")
    for name in _SITES:
        own = run.projected(layer, name, trace.resid[layer][None, None])
        found = trace[name, layer]
        if differ(own[:, :, :: own.shape[2] // found.shape[2]], found, view.dtype):
            _refuse(view, f"layer {layer}'s {name}, which is no linear map of its normed input")


def _refuse(view: ModelView, component: str) -> None:
    raise UnsupportedModelError(
        f"{view.name}: {component}: its direct edges have no exact form here"
    )
