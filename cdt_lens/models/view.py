"""One view over TransformerLens' two model classes, `HookedTransformer` and `TransformerBridge`.

Everything else in this package sees a model only as a `ModelView`:

1. `run` makes one ordinary forward pass, records the activations asked for and the call of every
   block, and stops before the unembedding, so that nothing of vocabulary size exists.
2. `replay` sends any residual stream through the model's own blocks from a chosen layer on, with
   hooks in place. The rows may be many copies of the recorded batch: (source x example).
3. `label_logits` ends with the model's own final norm and the unembedding columns of a few tokens.

The caller's model is never changed: hooks, training mode and gradient mode are as before after
every call, whether it returned or raised. Prompts are padded on the right, where causal attention
never looks, so padding cannot change a number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformer_lens
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.models.caller_hooks import caller_hooks
from cdt_lens.models.sites import NORMS, Hook, Site, find_sites
from cdt_lens.models.trace import BlockCall, Trace, _recorder, _shared_calls


class _StopBeforeUnembedding(Exception):
    """Ends an ordinary run once the residual stream is complete."""


def is_model(value: object) -> bool:
    """Whether `value` is one of TransformerLens' decoder classes."""
    try:
        hooked = transformer_lens.HookedTransformer
    except (AttributeError, ImportError):  # removed in TransformerLens 4.0
        return isinstance(value, TransformerBridge)
    return isinstance(value, (hooked, TransformerBridge))


class ModelView:
    """A `HookedTransformer` or `TransformerBridge`, seen the same way. Get one by `view_of`."""

    def __init__(self, tl: nn.Module) -> None:
        if not is_model(tl):
            raise InputError(
                f"model: expected a HookedTransformer or TransformerBridge, got "
                f"{type(tl).__name__}; cdt_lens.load_model makes one"
            )
        self.tl: Any = tl
        cfg: Any = self.tl.cfg
        self.n_layers: int = int(cfg.n_layers)
        self.n_heads: int = int(cfg.n_heads)
        self.n_kv_heads: int = int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
        self.d_head: int = int(cfg.d_head)
        self.d_model: int = int(cfg.d_model)
        self.n_ctx: int = int(cfg.n_ctx)
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
        """The Hugging Face configuration behind a bridge, or None."""
        return getattr(self.tl.original_model, "config", None) if self.is_bridge else None

    @property
    def device(self) -> torch.device:
        """Where the residual stream lives."""
        return next(self.tl.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the weights."""
        return next(self.tl.parameters()).dtype

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a layer read the same stream: neither feeds the other."""
        return bool(getattr(self.tl.cfg, "parallel_attn_mlp", False))

    @property
    def blocks(self) -> Any:
        """The transformer blocks, as modules."""
        return self.tl.blocks

    @property
    def sites(self) -> frozenset[Site]:
        """Every site that this model has."""
        return frozenset(self._places)

    def norms(self, layer: int) -> tuple[str, ...]:
        """Names of the norms with hook points in `layer` (`n_layers`: the final norm)."""
        return tuple(n for n in NORMS if (f"{n}.scale", layer) in self._places)

    def norm_bias(self, norm: str, layer: int) -> Float[Tensor, " d_model"] | None:
        """The bias of a norm, or None."""
        module = self._places[f"{norm}.out", layer].module
        inner = getattr(module, "original_component", module)
        bias = getattr(inner, "b", None)
        bias = getattr(inner, "bias", None) if bias is None else bias
        return bias.detach() if isinstance(bias, Tensor) else None

    # ------------------------------------------------------------------ hooks

    @contextmanager
    def hooked(self, hooks: Mapping[Site, Hook]) -> Iterator[None]:
        """Within the `with`, `hooks[site]` sees each activation and may return another for it.

        Raises:
            UnsupportedModelError: the model has no such site.
        """
        handles = []
        try:
            for site, hook in hooks.items():
                if site not in self._places:
                    raise UnsupportedModelError(
                        f"{self.name}: layer {site[1]} has no activation {site[0]!r} to hook; "
                        "choose rules that do not need it"
                    )
                handles.append(self._places[site].attach(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def quiet(self, *, gradients: bool = False) -> Iterator[None]:
        """Evaluation mode, and gradients only if asked for; both as before afterwards."""
        # A bridge's own modules leave out some of the Hugging Face model's, such as its dropout.
        roots = [self.tl, self.tl.original_model] if self.is_bridge else [self.tl]
        training = list({m: None for root in roots for m in root.modules() if m.training})
        try:
            for module in training:
                module.training = False
            with warnings.catch_warnings():
                # The bridge warns each time a norm's scale is edited, as some rules mean to do.
                warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
                with torch.set_grad_enabled(gradients):
                    yield
        finally:
            for module in training:
                module.training = True

    # ------------------------------------------------------------------ running it

    def run(self, tokens: Int[Tensor, "batch pos"], record: Iterable[Site] = ()) -> Trace:
        """One ordinary forward pass, stopped before the unembedding.

        Raises:
            InputError: the prompts are longer than the model's context.
        """
        activations: dict[Site, Tensor] = {}
        hooks = {site: _recorder(activations, site) for site in record}
        with self.quiet(), self.hooked(hooks):
            resid, calls = self.stream(tokens)
        return Trace(resid, calls, activations)

    def stream(
        self, tokens: Int[Tensor, "batch pos"], stop: int | None = None
    ) -> tuple[tuple[Float[Tensor, "batch pos d_model"], ...], tuple[BlockCall, ...]]:
        """Residual streams before each block up to `stop` (default: to the end), and the calls.

        Runs the model's own forward pass in the caller's mode and stops it there. Raises as `run`.
        """
        resid: list[Tensor] = []
        calls: list[BlockCall] = []
        # A hook of the caller's may edit in place what would stand in `resid`.
        keep = torch.clone if caller_hooks(self.tl) else lambda value: value

        def note_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            resid.append(keep(args[0] if args else rest.pop("hidden_states")))
            calls.append(BlockCall(args[1:], rest))
            if len(resid) - 1 == stop:
                raise _StopBeforeUnembedding

        def end(_module: nn.Module, args: tuple[Any, ...]) -> None:
            resid.append(keep(args[0]))
            raise _StopBeforeUnembedding

        ends = [m for m in (getattr(self.tl, "ln_final", None), self.tl.unembed) if m is not None]
        # Before the caller's own hooks, which act again when a stream is sent through the blocks.
        handles = [
            block.register_forward_pre_hook(note_call, with_kwargs=True, prepend=True)
            for block in self.blocks
        ]
        handles += [module.register_forward_pre_hook(end, prepend=True) for module in ends]
        try:
            self._forward(tokens.to(self.device))
        except _StopBeforeUnembedding:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return tuple(resid), _shared_calls(calls, tokens.shape[0])

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The model's own logits, by its own whole forward pass."""
        with self.quiet():
            return self._forward(tokens.to(self.device))

    def check_length(self, tokens: int, where: str = "") -> None:
        """Refuse (InputError) a prompt longer than the context; rotary models would run on."""
        if tokens > self.n_ctx:
            raise InputError(
                f"{where}prompt of {tokens} tokens: {self.name} reads at most {self.n_ctx}; "
                "shorten or truncate the prompts"
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
        """Send `resid` through blocks `start` to `stop` (default: the last) with `hooks` in place.

        `row` is any number of copies of the trace's batch; returns the stream after the last block.
        """
        with self.quiet(), self.hooked(hooks):
            return self.through(resid, trace.calls[start:stop], start)

    def through(
        self, resid: Float[Tensor, "row pos d_model"], calls: Iterable[BlockCall], start: int
    ) -> Float[Tensor, "row pos d_model"]:
        """Send `resid` through one block a call, from block `start` on, in the caller's mode."""
        for block, call in zip(list(self.blocks)[start:], calls, strict=False):
            out = block(resid, *call.args, **call.kwargs)
            resid = out[0] if isinstance(out, tuple) else out
        return resid

    # ------------------------------------------------------------------ logits

    def read_out(self, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_vocab"]:
        """Compute the logits of the whole vocabulary from final residual vectors.

        Runs the model's own unembedding in the caller's mode.

        Args:
            resid: residual vectors after the last block.

        Returns:
            Soft-capped logits, in at least float32.
        """
        return self.softcapped(at_least_float32(self.tl.unembed(self.normed(resid)[:, None])[:, 0]))

    def candidate_logits(
        self, resid: Float[Tensor, "*rows batch d_model"], candidates: Int[Tensor, "batch k"]
    ) -> Float[Tensor, "*rows batch k"]:
        """Compute the logits of a few candidate tokens from final residual vectors.

        Runs in the caller's mode. No gradient reaches the unembedding.

        Args:
            resid: residual vectors after the last block, at the answer positions.
            candidates: token ids of each example.

        Returns:
            Soft-capped logits, in at least float32, whatever the type of the weights: in half
            precision whole logits lie on a coarse grid and tie.
        """
        return self.softcapped(self.unembedded(self.normed(resid), candidates))

    def normed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the model's own final norm, if it has one, in the caller's mode."""
        if ("ln_final.in", self.n_layers) not in self._places:
            return resid
        return self.tl.ln_final(resid.reshape(-1, 1, resid.shape[-1])).reshape(resid.shape)

    def unembedded(
        self, normed: Float[Tensor, "*rows batch d_model"], candidates: Int[Tensor, "batch k"]
    ) -> Float[Tensor, "*rows batch k"]:
        """Compute candidate logits before the soft-cap from vectors after the final norm."""
        columns, bias = self.unembedding(candidates)
        return torch.einsum("...bd,bkd->...bk", at_least_float32(normed), columns) + bias

    def softcapped(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the model's soft-cap `c tanh(l / c)`, if it has one."""
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def unembedding(
        self, tokens: Int[Tensor, "batch k"]
    ) -> tuple[Float[Tensor, "batch k d_model"], Float[Tensor, "batch k"]]:
        """Return the unembedding vectors and biases of a few tokens, in at least float32.

        Scores are small differences between logits. Biases are 0 where the model has none.
        """
        unembed = self.tl.unembed
        ids = tokens.to(self.device)
        bias = getattr(unembed, "b_U", None)
        columns = at_least_float32(unembed.W_U.detach().T[ids])
        zeros = torch.zeros_like(columns[..., 0])
        return columns, zeros if bias is None else bias.detach()[ids].to(columns)

    @property
    def logit_softcap(self) -> float | None:
        """`c` where the model's logits are `c tanh(l / c)` of the unembedding's, else None."""
        cap = getattr(self.tl.cfg, "output_logits_soft_cap", None)
        if self.is_bridge:
            cap = getattr(self.hf_config, "final_logit_softcapping", None) or cap
        return float(cap) if cap is not None and cap > 0 else None

    def activation(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        """The MLP's activation function at `layer`, or None if it cannot be told."""
        mlp = getattr(self.blocks[layer], "mlp", None)
        inner = getattr(mlp, "original_component", mlp)
        named: Any = (getattr(inner, name, None) for name in ("act_fn", "act", "activation_fn"))
        return next((each for each in named if callable(each)), None)


def view_of(model: nn.Module | ModelView) -> ModelView:
    """The `ModelView` of a TransformerLens model (a view is returned as it is).

    Raises:
        InputError: `model` is of another class.
    """
    return model if isinstance(model, ModelView) else ModelView(model)


def at_least_float32(value: Tensor) -> Tensor:
    """Return `value`, converted to float32 if its type is shorter."""
    return value.float() if value.dtype.itemsize < 4 else value


def at_answer(
    resid: Float[Tensor, "*rows batch pos d"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "*rows batch d"]:
    """Select the last real position of each right-padded prompt."""
    batch = torch.arange(resid.shape[-3], device=resid.device)
    return resid[..., batch, lengths.to(resid.device) - 1, :]
