"""Present TransformerLens' two model classes, `HookedTransformer` and `TransformerBridge`, as one.

The rest of this package uses a model only through `ModelView`:

1. `run` makes one ordinary forward pass, records the requested activations and the call of every
   block, and stops before the unembedding, so that no tensor of vocabulary size exists.
2. `replay` sends any residual stream through the model's own blocks from a chosen layer on, with
   hooks attached. The rows may be many copies of the recorded batch: (source x example).
3. `candidate_logits` applies the model's own final norm and the unembedding columns of a few
   tokens. Words of several tokens need the whole vocabulary (`words.py`).

The caller's model is never changed: hooks, training mode and gradient mode are as before after
every call that returns or raises. Prompts are padded on the right, where causal attention does not
reach, so that padding cannot change a number.

The blocks may be on several devices (`device_map` of accelerate, whose hooks move the input of each
block to its device). `ModelView.device` is then the device of the first weight, and everything that
a view takes and returns is there. Hooks too receive their activation on this device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import transformer_lens
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformer_lens.model_bridge import TransformerBridge

from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.core.process_wide import ignored
from cdt_lens.core.undo import unbroken, undoing
from cdt_lens.models.caller_hooks import caller_hooks
from cdt_lens.models.heads import Head, check_heads
from cdt_lens.models.positions import longrope_limit
from cdt_lens.models.sites import NORMS, Hook, Site, find_sites
from cdt_lens.models.trace import BlockCall, Trace, _recorder, _shared_calls
from cdt_lens.models.words import Candidates, Words, in_parts, scores_of


class _StopBeforeUnembedding(Exception):
    """Ends an ordinary run once the residual stream is complete."""


def is_model(value: object) -> bool:
    """Return whether `value` is one of TransformerLens' decoder classes.

    Args:
        value: any object.

    Returns:
        True for a `HookedTransformer` or a `TransformerBridge`.
    """
    try:
        hooked = transformer_lens.HookedTransformer
    except (AttributeError, ImportError):  # removed in TransformerLens 4.0
        return isinstance(value, TransformerBridge)
    return isinstance(value, (hooked, TransformerBridge))


class ModelView:
    """A `HookedTransformer` or `TransformerBridge` behind one interface. Use `view_of` to get one.

    Args:
        tl: the TransformerLens model.

    Raises:
        InputError: `tl` is of another class.
    """

    _advice = "load_model(name) loads a HookedTransformer or TransformerBridge"

    def __init__(self, tl: nn.Module) -> None:
        if not is_model(tl):
            raise InputError(
                f"model: expected a HookedTransformer or TransformerBridge, got "
                f"{type(tl).__name__}. Load one with cdt_lens.load_model."
            )
        self.tl: Any = tl
        cfg: Any = self.tl.cfg
        self.n_layers: int = int(cfg.n_layers)
        self.n_heads: int = int(cfg.n_heads)
        self.n_kv_heads: int = int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
        self.d_head: int = int(cfg.d_head)
        self.d_model: int = int(cfg.d_model)
        self.n_ctx: int = int(cfg.n_ctx)
        self.d_vocab: int = int(cfg.d_vocab)
        self.is_bridge = isinstance(tl, TransformerBridge)
        self.name: str = str(getattr(cfg, "model_name", None) or type(tl).__name__)
        self._places = find_sites(tl, self.n_layers)

    # ------------------------------------------------------------------ what the model is

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the wrapped model, or None."""
        return self.tl.tokenizer

    @property
    def hf_config(self) -> Any:
        """The Hugging Face configuration that the model was loaded with, or None."""
        if self.is_bridge:
            return getattr(self.tl.original_model, "config", None)
        return getattr(self.tl, "hugging_face_config", None)

    @property
    def longrope_limit(self) -> int | None:
        """The number of tokens beyond which a batch is read with longrope's long factors."""
        return longrope_limit(self.hf_config)

    @property
    def device(self) -> torch.device:
        """The device of every tensor outside the model: that of the first weight."""
        return next(self.tl.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the weights."""
        return next(self.tl.parameters()).dtype

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a layer read the same residual stream."""
        return bool(getattr(self.tl.cfg, "parallel_attn_mlp", False))

    @property
    def blocks(self) -> Any:
        """The transformer blocks, as modules."""
        return self.tl.blocks

    @property
    def sites(self) -> frozenset[Site]:
        """Every site of this model."""
        return frozenset(self._places)

    def norms(self, layer: int) -> tuple[str, ...]:
        """Return the names of the norms with hook points in a layer.

        Args:
            layer: the layer. `n_layers` stands for the final norm.

        Returns:
            Names such as "ln1" and "ln2".
        """
        return tuple(n for n in NORMS if (f"{n}.scale", layer) in self._places)

    def norm_modules(self, layer: int) -> tuple[nn.Module, ...]:
        """Return the modules of these norms, with everything inside them.

        Args:
            layer: the layer.
        """
        own = (self._places[f"{norm}.in", layer].module for norm in self.norms(layer))
        return tuple(module for norm in own for module in norm.modules())

    def norm_bias(self, norm: str, layer: int) -> Float[Tensor, " d_model"] | None:
        """Return the bias of a norm, or None.

        Args:
            norm: name of the norm.
            layer: layer of the norm.

        Returns:
            The bias, detached, on the view's device. None where the norm has no bias.
        """
        module = self._places[f"{norm}.out", layer].module
        inner = getattr(module, "original_component", module)
        bias = getattr(inner, "b", None)
        bias = getattr(inner, "bias", None) if bias is None else bias
        return bias.detach().to(self.device) if isinstance(bias, Tensor) else None

    def norm_width(self, norm: str, layer: int) -> int | None:
        """Return how many elements one scale of a norm divides, or None without a weight.

        Args:
            norm: name of the norm.
            layer: layer of the norm.
        """
        weights = list(self._places[f"{norm}.out", layer].module.parameters())
        return weights[0].shape[-1] if weights else None

    def heads(self, heads: Iterable[Head | str]) -> tuple[Head, ...]:
        """Return heads of this model, in order and without repeats.

        Args:
            heads: heads, their names, or a circuit, which must be of this model.

        Returns:
            The heads, ordered by layer and head.

        Raises:
            InputError: an item is not a head, or a head is outside the model.
            ArtifactError: the circuit was found in another model.
        """
        check_model = getattr(heads, "check_model", None)
        if check_model is not None:
            check_model(self)
        return check_heads(heads, self.n_layers, self.n_heads)

    # ------------------------------------------------------------------ hooks

    @contextmanager
    def hooked(self, hooks: Mapping[Site, Hook]) -> Iterator[None]:
        """Attach hooks to sites within the `with` block.

        Args:
            hooks: for each site, a function that receives the activation, on the view's device. It
                returns a new value for the activation, or None to keep it.

        Raises:
            UnsupportedModelError: the model has no such site.
        """
        handles: list[Any] = []
        with undoing(functools.partial(_remove, handles)):
            self._attach(hooks, handles)
            yield

    @unbroken
    def _attach(self, hooks: Mapping[Site, Hook], handles: list[Any]) -> None:
        device = self.device
        for site, hook in hooks.items():
            if site not in self._places:
                raise UnsupportedModelError(
                    f"{self.name}: layer {site[1]} has no activation {site[0]!r} to hook; "
                    "choose rules that do not need it"
                )
            handles.append(self._places[site].attach(_on(device, hook)))

    @contextmanager
    def quiet(self, *, gradients: bool = False) -> Iterator[None]:
        """Use evaluation mode within the `with` block, and restore the caller's modes afterwards.

        Args:
            gradients: whether autograd records operations.
        """
        # The bridge's modules do not include all of the Hugging Face model's, such as dropout.
        roots = [self.tl, self.tl.original_model] if self.is_bridge else [self.tl]
        training = list({m: None for root in roots for m in root.modules() if m.training})
        before = torch.is_grad_enabled()

        def put_back() -> None:
            torch.set_grad_enabled(before)
            for module in training:
                module.training = True

        # The bridge warns each time a norm's scale is edited, which some rules do.
        with ignored("A forward hook edited hook_scale"), undoing(put_back):
            for module in training:
                module.training = False
            torch.set_grad_enabled(gradients)
            yield

    @contextmanager
    def recomputed(self) -> Iterator[None]:
        """Use gradient checkpointing of every block within the `with` block.

        A forward pass that autograd records keeps the inputs of the blocks only. The backward pass
        runs each block again, with its hooks.
        """
        blocks = list(self.blocks)
        # A library such as accelerate may have replaced the method of a module.
        before = [(vars(block), vars(block).get("forward")) for block in blocks]
        with undoing(functools.partial(_put_back_forward, before)):
            for block in blocks:
                vars(block)["forward"] = functools.partial(_recompute, block.forward)
            yield

    # ------------------------------------------------------------------ running it

    def run(self, tokens: Int[Tensor, "batch pos"], record: Iterable[Site] = ()) -> Trace:
        """Make one ordinary forward pass that stops before the unembedding.

        Args:
            tokens: the prompts, padded on the right.
            record: the sites to record.

        Returns:
            The residual streams, the call of every block, and the recorded activations, detached.

        Raises:
            InputError: the prompts are longer than the model's context.
            UnsupportedModelError: the model has no such site, or its masks differ between prompts.
        """
        activations: dict[Site, Tensor] = {}
        hooks = {site: _recorder(activations, site) for site in record}
        with self.quiet(), self.hooked(hooks):
            resid, calls = self.stream(tokens)
        return Trace(resid, calls, activations)

    def stream(
        self, tokens: Int[Tensor, "batch pos"], stop: int | None = None
    ) -> tuple[tuple[Float[Tensor, "batch pos d_model"], ...], tuple[BlockCall, ...]]:
        """Run the model's own forward pass in the caller's mode, and stop it at a block.

        Args:
            tokens: the prompts, padded on the right.
            stop: the block to stop before. None runs all blocks.

        Returns:
            The residual streams before each block up to `stop`, or before each block and after the
            last. Also the call of every block that was reached.

        Raises:
            InputError: the prompts are longer than the model's context.
            UnsupportedModelError: the masks or positions differ between prompts.
        """
        resid: list[Tensor] = []
        calls: list[BlockCall] = []
        device = self.device
        # A hook of the caller's may edit the recorded stream in place.
        keep = torch.clone if caller_hooks(self.tl) else lambda value: value

        def note_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            stream = args[0] if args else rest.pop("hidden_states")
            resid.append(keep(stream.to(device)))
            calls.append(BlockCall(args[1:], rest))
            if len(resid) - 1 == stop:
                raise _StopBeforeUnembedding

        def end(_module: nn.Module, args: tuple[Any, ...]) -> None:
            resid.append(keep(args[0].to(device)))
            raise _StopBeforeUnembedding

        ends = [m for m in (getattr(self.tl, "ln_final", None), self.tl.unembed) if m is not None]
        handles: list[Any] = []

        @unbroken
        def attach() -> None:
            # Record before the caller's hooks, which act again when a stream is replayed.
            for block in self.blocks:
                handles.append(
                    block.register_forward_pre_hook(note_call, with_kwargs=True, prepend=True)
                )
            for module in ends:
                handles.append(module.register_forward_pre_hook(end, prepend=True))

        with undoing(functools.partial(_remove, handles)), suppress(_StopBeforeUnembedding):
            attach()
            self._forward(tokens.to(self.device))
        return tuple(resid), _shared_calls(calls, tokens.shape[0])

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Compute the model's logits with its own whole forward pass.

        Args:
            tokens: the prompts, padded on the right.

        Returns:
            Logits at every position.

        Raises:
            InputError: the prompts are longer than the model's context.
        """
        with self.quiet():
            return self._forward(tokens.to(self.device))

    def check_length(self, tokens: int, where: str = "") -> None:
        """Check that a prompt fits the context.

        A rotary model would run beyond its context without an error.

        Args:
            tokens: number of tokens of the prompt.
            where: start of the error message, such as the name of the example.

        Raises:
            InputError: the prompt is longer than the model's context.
        """
        if tokens > self.n_ctx:
            raise InputError(
                f"{where}prompt of {tokens} tokens: {self.name} reads at most {self.n_ctx}. "
                "Shorten or truncate the prompts."
            )

    def _forward(self, tokens: Tensor) -> Tensor:
        self.check_length(tokens.shape[1])
        if self.is_bridge:
            return self.tl(tokens, use_cache=False)
        # A tokenizer that pads on the left would make HookedTransformer mask real tokens that
        # happen to equal the padding token; our padding is on the right.
        sides = {} if self.tl.tokenizer is None else {"padding_side": "right"}
        return self.tl(tokens, return_type="logits", **sides)

    def replay(
        self,
        trace: Trace,
        resid: Float[Tensor, "row pos d_model"],
        start: int,
        hooks: Mapping[Site, Hook],
        stop: int | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """Send a residual stream through the model's own blocks with hooks attached.

        Args:
            trace: the ordinary run that recorded the calls of the blocks.
            resid: the residual stream before block `start`. Its rows may be any number of copies of
                the trace's batch.
            start: the first block.
            hooks: functions by site, see `hooked`.
            stop: the block to stop before. None runs to the last block.

        Returns:
            The residual stream before block `stop`, or after the last block.

        Raises:
            UnsupportedModelError: the model has no such site.
        """
        with self.quiet(), self.hooked(hooks):
            return self.through(resid, trace.calls[start:stop], start)

    def through(
        self, resid: Float[Tensor, "row pos d_model"], calls: Iterable[BlockCall], start: int
    ) -> Float[Tensor, "row pos d_model"]:
        """Send a residual stream through one block for each call, in the caller's mode.

        Args:
            resid: the residual stream before block `start`.
            calls: the recorded arguments of each block.
            start: the first block.

        Returns:
            The residual stream after the last of these blocks.
        """
        for block, call in zip(list(self.blocks)[start:], calls, strict=False):
            out = block(resid, *call.args, **call.kwargs)
            resid = out[0] if isinstance(out, tuple) else out
        return resid.to(self.device)

    # ------------------------------------------------------------------ logits

    def read_out(self, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_vocab"]:
        """Compute the logits of the whole vocabulary from final residual vectors.

        Runs the model's own unembedding in the caller's mode.

        Args:
            resid: residual vectors after the last block.

        Returns:
            Soft-capped logits, in at least float32.
        """
        logits = at_least_float32(_run(self.tl.unembed, self.normed(resid)[:, None])[:, 0])
        return self.softcapped(logits * self.logit_scale)

    def candidate_logits(
        self, resid: Float[Tensor, "*rows _read d_model"], candidates: Candidates
    ) -> Float[Tensor, "*rows batch k"]:
        """Compute the logits of a few candidate tokens, or the scores of words.

        Runs in the caller's mode. No gradient reaches the unembedding.

        Args:
            resid: residual vectors after the last block, at the answer positions.
            candidates: the candidates of each example.

        Returns:
            Soft-capped logits, in at least float32, whatever the type of the weights: in half
            precision whole logits lie on a coarse grid and tie. The score of a word is the sum of
            its tokens' log-probabilities.
        """

        def read(part: Tensor) -> Tensor:
            logits = self.softcapped(self.unembedded(self.normed(part), candidates))
            return scores_of(logits, candidates)

        return read(resid) if resid.ndim < 3 else in_parts(read, resid, candidates, self.d_vocab)

    def normed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the model's own final norm in the caller's mode.

        Args:
            resid: residual vectors after the last block.

        Returns:
            The normed vectors, or `resid` if the model has no final norm.
        """
        if ("ln_final.in", self.n_layers) not in self._places:
            return resid
        rows = resid.reshape(-1, 1, resid.shape[-1])
        return _run(self.tl.ln_final, rows).reshape(resid.shape)

    def normed_by(
        self, norm: str, layer: int, value: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """Apply a norm of a block in the caller's mode.

        Args:
            norm: name of the norm, such as "ln1".
            layer: layer of the norm.
            value: vectors of the residual stream.

        Returns:
            The normed vectors, or `value` if the block has no such norm.
        """
        place = self._places.get((f"{norm}.in", layer))
        if place is None:
            return value
        return _run(place.module, value.reshape(-1, 1, value.shape[-1])).reshape(value.shape)

    def unembedded(
        self, normed: Float[Tensor, "*rows _read d_model"], candidates: Candidates
    ) -> Float[Tensor, "*rows _read _k"]:
        """Compute candidate logits, scaled as the model scales them, before the soft-cap.

        Args:
            normed: vectors after the final norm.
            candidates: the candidates of each example.

        Returns:
            Logits, in at least float32: of the candidates, or of the whole vocabulary for words.
        """
        columns, bias = self.unembedding(candidates)
        normed = at_least_float32(normed).to(columns.device)
        if isinstance(candidates, Words):
            return (normed @ columns.T + bias).to(self.device)
        return (torch.einsum("...bd,bkd->...bk", normed, columns) + bias).to(self.device)

    def softcapped(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the model's soft-cap `c tanh(l / c)`.

        Args:
            logits: logits as the unembedding returns them.

        Returns:
            Soft-capped logits, or `logits` if the model has no soft-cap.
        """
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def unembedding(
        self, tokens: Candidates
    ) -> tuple[Float[Tensor, "*tokens d_model"], Float[Tensor, "*tokens"]]:
        """Return the unembedding vectors and biases of a few tokens, times `logit_scale`.

        They are in at least float32, because scores are small differences between logits.

        Args:
            tokens: token ids, or words, which need those of the whole vocabulary.

        Returns:
            The vectors, and the biases, which are 0 if the model has none. Both are detached, and
            on the device of the unembedding.
        """
        unembed = self.tl.unembed
        vectors, bias = unembed.W_U.detach().T, getattr(unembed, "b_U", None)
        ids = slice(None) if isinstance(tokens, Words) else tokens.to(vectors.device)
        columns = at_least_float32(vectors[ids])
        bias = torch.zeros_like(columns[..., 0]) if bias is None else bias.detach()[ids].to(columns)
        if self.logit_scale == 1:  # saves a copy of the whole unembedding
            return columns, bias
        return columns * self.logit_scale, bias * self.logit_scale

    @property
    def logit_scale(self) -> float:
        """The factor between the unembedding and the logits, as in Cohere and Granite."""
        if not self.is_bridge:
            return 1.0
        # Folding it into the unembedding sets the attribute of Cohere's module to 1.
        factor = getattr(self.tl.original_model, "logit_scale", None)
        divisor = getattr(self.hf_config, "logits_scaling", None)
        return float(factor or 1.0) / float(divisor or 1.0)

    @property
    def logit_softcap(self) -> float | None:
        """The `c` of a model whose logits are `c tanh(l / c)` of the unembedding's, or None."""
        cap = getattr(self.tl.cfg, "output_logits_soft_cap", None)
        if self.is_bridge:
            cap = getattr(self.hf_config, "final_logit_softcapping", None) or cap
        return float(cap) if cap is not None and cap > 0 else None

    def activation(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        """Return the activation function of a layer's MLP.

        Args:
            layer: the layer.

        Returns:
            The function, or None if the MLP does not expose it.
        """
        mlp = getattr(self.blocks[layer], "mlp", None)
        inner = getattr(mlp, "original_component", mlp)
        named: Any = (getattr(inner, name, None) for name in ("act_fn", "act", "activation_fn"))
        return next((function for function in named if callable(function)), None)


def view_of(model: nn.Module | ModelView) -> ModelView:
    """Return the `ModelView` of a TransformerLens model.

    Args:
        model: the model, or a view, which is returned unchanged.

    Returns:
        The view.

    Raises:
        InputError: `model` is of another class.
    """
    return model if isinstance(model, ModelView) else ModelView(model)


def _on(device: torch.device, hook: Hook) -> Hook:
    """Let a hook receive its activation on a device. What it returns goes back to the model's."""

    def moved(value: Tensor) -> Tensor | None:
        result = hook(value.to(device))
        return None if result is None else result.to(value.device)

    return moved


def _run(module: nn.Module, value: Tensor) -> Tensor:
    """Run a module outside the model's own pass, on the device of its weights."""
    weight = next(module.parameters(), value)
    return module(value.to(weight.device)).to(value.device)


def _recompute(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _put_back_forward(before: list[tuple[dict[str, Any], Any]]) -> None:
    for attributes, forward in before:
        attributes.pop("forward", None)
        if forward is not None:
            attributes["forward"] = forward


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def at_least_float32(value: Tensor) -> Tensor:
    """Convert a tensor of a shorter type to float32.

    Args:
        value: a tensor.

    Returns:
        `value` itself if its type has at least 32 bits.
    """
    return value.float() if value.dtype.itemsize < 4 else value


def at_answer(
    resid: Float[Tensor, "*rows batch pos d"],
    lengths: Int[Tensor, " batch"],
    candidates: Candidates | None = None,
) -> Float[Tensor, "*rows _read d"]:
    """Select the last real position of each right-padded prompt, or the reads of words.

    Args:
        resid: vectors at every position.
        lengths: number of real tokens of each prompt.
        candidates: the candidates that are read there.

    Returns:
        The vectors at positions `lengths - 1`, or at each read of words.
    """
    if isinstance(candidates, Words):
        own = candidates.to(resid.device)
        return resid[..., own.rows, own.positions, :]
    batch = torch.arange(resid.shape[-3], device=resid.device)
    return resid[..., batch, lengths.to(resid.device) - 1, :]
