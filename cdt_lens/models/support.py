"""Check that the rules describe a model's architecture.

1. Refuse components that have no rule, by name: ALiBi, attention sinks, layers without attention
   and others.
2. Make one ordinary run on a few tokens and check the identities that the rules rely on: the
   residual adds, z = pattern @ v, and logits = softcap(unembedding(final norm)).
3. Make one run on zeros, which reads every bias where the rules use it, because a linear map of 0
   is its bias. The same run shows whether edits at the hook points take effect, which is not so in
   every `TransformerBridge`.

A failed check raises an error with the component's name, so that no number is silently wrong.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.models.caller_hooks import caller_hooks, lifted
from cdt_lens.models.resident import devices_of, is_offloaded, resident, unreadable
from cdt_lens.models.sites import Hook, Site, is_routed
from cdt_lens.models.trace import Trace
from cdt_lens.models.view import ModelView, at_least_float32

_PROBE_LENGTH = 7
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Mixtures of experts, by model_type, whose scores are compared with Hugging Face's in the tests.
_ROUTED_FAMILIES = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})


@dataclass(frozen=True, eq=False)
class Support:
    """The biases and MLPs of a supported model.

    Attributes:
        biases: the non-zero biases by site: q, k and v `[head, d_head]`; pre and pre_linear
            `[d_mlp]`; the output projections of attention and MLP (see `output_site`) and
            "<norm>.out" `[d_model]`.
        plain_mlp: layers whose MLP is act(pre) or act(pre) * pre_linear. Rules that compute the MLP
            by formula need this.
        hidden_norms: "attention" and "mlp" where these hold a norm that is no site, such as that
            of each head's queries in StableLM 2 12B, or the one behind SoLU.
    """

    biases: Mapping[Site, Tensor] = field(repr=False)
    plain_mlp: frozenset[int]
    hidden_norms: frozenset[str]

    def check_norms(self, name: str, parts: Iterable[str], choice: str) -> None:
        """Refuse a choice that treats norms by a rule where a norm cannot be reached.

        Args:
            name: name of the model.
            parts: the parts of a block in which the choice treats norms.
            choice: the choice, such as norm='frozen'.

        Raises:
            UnsupportedModelError: one of the parts holds a norm that is no site.
        """
        hidden = sorted(self.hidden_norms.intersection(parts))
        if hidden:
            raise UnsupportedModelError(
                f"{name}: the {hidden[0]} holds a norm without a hook point for its scale, so "
                f"{choice} has no rule here; use rules='stable' or slopes='stable'"
            )


def output_site(view: ModelView, name: str, layer: int) -> Site:
    """Return the site of the output projection of attention or MLP.

    Where a norm follows the projection, as in Gemma 2 and 3, this is the norm's input. Where the
    block multiplies the output, as in Granite, this is the output before its product.

    Args:
        view: the model.
        name: "attn_out" or "mlp_out".
        layer: the layer.

    Returns:
        The site.
    """
    own = name.removesuffix("_out")
    before = [("ln1_post.in" if own == "attn" else "ln2_post.in", layer), (f"{own}.out", layer)]
    return next((site for site in before if site in view.sites), (name, layer))


# The result of the check, with the state of the weights that were checked.
_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[object, Support]]
_CHECKED = weakref.WeakKeyDictionary()


def check_supported(view: ModelView) -> Support:
    """Check the model against the rules, once for its present weights.

    Args:
        view: the model.

    Returns:
        Its biases and the layers with a plain MLP.

    Raises:
        UnsupportedModelError: a component has no rule. The message names it.
        InputError: a weight is not finite.
    """
    _refuse_flags(view)
    _refuse_weights(view)
    state = _weights_state(view)
    before = _CHECKED.get(view.tl)
    if before is not None and before[0] == state:
        return before[1]
    # The caller's hooks do not change the architecture.
    with lifted(view.tl):
        support = _check(view)
    _CHECKED[view.tl] = (state, support)
    return support


def check_caller_hooks(
    view: ModelView,
    tokens: Int[Tensor, "batch pos"],
    lengths: Int[Tensor, " batch"],
    *,
    edits: str | None = None,
) -> None:
    """Check that the caller's hooks act only where this package applies them too.

    The check runs two copies of the batch with the hooks, and with `edits` the batch without them.
    It does nothing if there are no hooks.

    Args:
        view: the model.
        tokens: the prompts, padded on the right.
        lengths: number of real tokens of each prompt.
        edits: name of the rule that cannot follow a hook that edits an activation. None allows
            edits.

    Raises:
        InputError: a hook acts between the last residual stream and the logits, or differs from
            call to call or between the rows of a batch, or edits an activation although `edits` is
            given.
    """
    names = caller_hooks(view.tl)
    if not names:
        return
    where = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    trace = view.run(tokens.repeat(2, 1))
    rows, last = torch.arange(len(tokens)), lengths.cpu() - 1
    ours = _whole_logits(view, trace.resid[-1][rows, last])
    own = at_least_float32(view.logits(tokens)[rows, last])
    tolerance = 1e-4 if view.dtype in (torch.float32, torch.float64) else 3e-2
    if not bool((ours - own).abs().max() <= tolerance * own.abs().max()):
        raise InputError(
            f"{view.name}: your hooks (on {where}) change the logits behind the last block, or "
            "return something else at each call. Only the answer position is normed and unembedded "
            "here, so these hooks would be applied incompletely. Remove them, or hook inside a "
            "block."
        )
    copies = [resid.chunk(2) for resid in trace.resid]
    if any(differ(a, b, view.dtype) for pair in copies for a, b in zip(*pair, strict=True)):
        raise InputError(
            f"{view.name}: your hooks (on {where}) treat the rows of a batch differently. One "
            "prompt takes several rows here, one for each head, and several prompts share a batch. "
            "Edit all rows alike, as in z[:, -1] = 0 in place of z[0, -1] = 0."
        )
    if edits is None:
        return
    with lifted(view.tl):
        plain = view.run(tokens)
    first = (pair[0] for pair in copies)
    if any(differ(a, b, torch.float32) for a, b in zip(first, plain.resid, strict=True)):
        raise InputError(
            f"{view.name}: your hooks (on {where}) edit activations, and {edits} cannot follow "
            "these edits completely. Use rules='ablation' or exact_ablation, or remove the hooks."
        )


def _whole_logits(
    view: ModelView, resid: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch d_vocab"]:
    """Compute the logits of the whole vocabulary in the way in which candidates are unembedded."""
    vocabulary = torch.arange(view.tl.unembed.W_U.shape[-1])
    with view.quiet():
        normed = view.normed(resid)
    return view.softcapped(view.unembedded(normed[:, None], vocabulary[None])[:, 0])


def _weights_state(view: ModelView) -> object:
    """Return a value that changes when the weights do, so that stored biases become invalid.

    Version counters miss edits through `.data`. So the values of small parameters, which hold the
    biases and the norms, count as well.
    """
    parameters = list(view.tl.parameters())
    present = [p.detach() for p in parameters if not p.is_meta]
    small = [p.float().flatten().cpu() for p in present if p.numel() < 65536]
    values = torch.cat(small).numpy().tobytes() if small else b""
    # Inference tensors have no version.
    where = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
    return where, hashlib.sha256(values).hexdigest()


def _check(view: ModelView) -> Support:
    _check_finite(view, view.tl)
    for block in view.blocks if is_offloaded(view) else ():
        with resident(block):
            _check_finite(view, block)
    _refuse_by_name(view)
    generator = torch.Generator().manual_seed(0)
    length = min(_PROBE_LENGTH, view.n_ctx)
    vocabulary = view.tl.unembed.W_U.shape[-1]
    tokens = torch.randint(vocabulary, (2, length), generator=generator)
    unseen = (".in", ".out")
    record = [s for s in view.sites if not s[0].endswith(unseen) or s[0] == "ln1.out"]
    trace = view.run(tokens, record)
    for site in record:
        if site not in trace and site[1] < view.n_layers:
            _refuse(view, f"layer {site[1]}'s hook point for {site[0]}, which never fires")
    _check_residual(view, trace)
    _check_attention(view, trace)
    _check_logits(view, trace, tokens)
    _check_norms(view, trace)
    biases = _read_biases(view, trace)
    plain = frozenset(layer for layer in range(view.n_layers) if _is_plain_mlp(view, trace, layer))
    return Support(biases, plain, _hidden_norms(view))


def _hidden_norms(view: ModelView) -> frozenset[str]:
    """Return the parts of the blocks that hold a norm that is no site."""
    found: set[str] = set()
    for layer, block in enumerate(view.blocks):
        known = {id(module) for module in view.norm_modules(layer)}
        for name, module in block.named_modules():
            if "norm" in type(module).__name__.lower() and id(module) not in known:
                found.add("mlp" if "mlp" in name.split(".") else "attention")
    return frozenset(found)


def _check_finite(view: ModelView, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.is_meta and not bool(torch.isfinite(parameter.detach()).all()):
            raise InputError(f"{view.name}: weight {name} holds NaN or infinity. Load it again.")


def _refuse(view: ModelView, component: str) -> None:
    raise UnsupportedModelError(
        f"{view.name}: {component}: no propagation rule exists for it, so every score would be "
        "wrong"
    )


def _refuse_flags(view: ModelView) -> None:
    """Refuse switches that bypass the hook points; a caller may turn them on at any time."""
    if view.n_kv_heads == view.n_heads and not view.is_bridge:
        return
    for flag in ("ungroup_grouped_query_attention", "use_split_qkv_input", "use_attn_in"):
        if getattr(view.tl.cfg, flag, False):
            raise UnsupportedModelError(
                f"{view.name}: cfg.{flag} is on, which bypasses the hook points of grouped heads "
                f"or norms. Turn it off (model.set_{flag}(False))."
            )


def _refuse_weights(view: ModelView) -> None:
    """Refuse weights whose values are elsewhere or are not plain floats."""
    away = unreadable(view)
    if away is not None:
        raise UnsupportedModelError(
            f"{view.name}: weight {away} is offloaded (on the meta device), and its value is read "
            "past the hooks with which accelerate loads it. Offload the projections of the blocks "
            "only, with cdt_lens.models.offload.offload(model)."
        )
    _refuse_devices(view)
    for name, parameter in view.tl.named_parameters():
        if parameter.dtype not in _TYPES:
            kind = str(parameter.dtype).removeprefix("torch.")
            _refuse(view, f"quantised weights ({name} in {kind})")


def _refuse_devices(view: ModelView) -> None:
    """Refuse a model on several devices if nothing moves the input of each block to its device."""
    devices = devices_of(view)
    if len(devices) < 2 or getattr(getattr(view.tl, "original_model", None), "hf_device_map", None):
        return
    what = "no device_map" if view.is_bridge else "HookedTransformer's n_devices"
    raise UnsupportedModelError(
        f"{view.name}: weights on several devices ({', '.join(devices)}) with {what}: nothing "
        "moves the input of a block that is run by itself to the block's device. Load the model "
        "with load_model(name, backend='bridge', device_map='auto')."
    )


def _refuse_by_name(view: ModelView) -> None:
    cfg = view.tl.cfg
    config = view.hf_config

    def flag(name: str) -> object:
        return getattr(cfg, name, None) or getattr(config, name, None)

    for layer, block in enumerate(view.blocks):
        if getattr(block, "attn", None) is None:
            _refuse(view, f"layer {layer} without attention heads ({_kind_of(config, layer)})")
    if any(name.endswith(".sinks") for name, _ in view.tl.named_parameters()):
        _refuse(view, "attention sinks, which take a part of every pattern")
    routed = any(is_routed(getattr(block, "mlp", None)) for block in view.blocks)
    if routed or flag("num_experts") or flag("num_local_experts"):
        _refuse_experts(view)
    if flag("positional_embedding_type") in ("alibi", "shortformer", "relative_positional_bias"):
        _refuse(view, f"{flag('positional_embedding_type')} positions inside attention")
    for name in ("clip_qkv", "use_logn_attn", "use_attention_sinks", "gated_q_proj"):
        if flag(name):
            _refuse(view, f"{name} in attention")
    if getattr(cfg, "attention_dir", "causal") != "causal":
        _refuse(view, "bidirectional attention")
    for layer, block in enumerate(view.blocks):
        # The generic bridge hands attention to Hugging Face: its pattern can be read, not edited.
        if type(getattr(block, "attn", None)).__name__ == "AttentionBridge":
            _refuse(view, "attention whose pattern TransformerBridge cannot edit")
        for name in ("q", "k", "v", "pattern", "z", "attn_out", "resid_post"):
            if (name, layer) not in view.sites:
                _refuse(view, f"layer {layer} without a hook point for {name}")


def _kind_of(config: Any, layer: int) -> str:
    """Return the configuration's name for the kind of a layer."""
    kinds = getattr(config, "layer_types", None) or ()
    return (
        str(kinds[layer]) if layer < len(kinds) else str(getattr(config, "model_type", "unknown"))
    )


def _refuse_experts(view: ModelView) -> None:
    """Refuse a mixture of experts, except those whose families are compared with Hugging Face."""
    kind = getattr(view.hf_config, "model_type", None)
    if not view.is_bridge or kind not in _ROUTED_FAMILIES:
        known = ", ".join(sorted(_ROUTED_FAMILIES))
        _refuse(view, f"mixture-of-experts MLP of {kind or 'HookedTransformer'} (known: {known})")
    way = getattr(view.hf_config, "_experts_implementation", None)
    if view.dtype == torch.float64 and way != "eager":
        raise UnsupportedModelError(
            f"{view.name}: its experts run as {way}, which torch does not have in float64. Load "
            "the model with load_model(..., dtype='float64'), or with experts_implementation="
            "'eager'."
        )


def differ(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two tensors differ by more than rounding could explain.

    Args:
        a: a tensor.
        b: the tensor that it should equal.
        dtype: the type that both were computed in.
    """
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    a, b = a.float(), b.float()
    return bool((a - b).norm() > tolerance * (b.norm() + 1e-6))


def has_embedding(view: ModelView) -> bool:
    """Return whether the token embedding is a site of the model."""
    return ("embed", 0) in view.sites


def check_embedding(view: ModelView, trace: Trace | None = None) -> None:
    """Check that the residual stream begins with the sum of token and position embeddings.

    Args:
        view: the model.
        trace: a run that recorded the site ("embed", 0); None checks the model alone.

    Raises:
        UnsupportedModelError: the embeddings are multiplied or changed before the first block.
    """
    if has_embedding(view):
        if trace is None:
            return
        positions = (trace.resid[0] - trace["embed", 0])[:1]
        if not differ(trace["embed", 0] + positions, trace.resid[0], view.dtype):
            return
    raise UnsupportedModelError(
        f"{view.name}: an embedding that the residual stream does not hold as it is: the input "
        "cannot take a baseline, so there are no edges from it and no empty run of MIB here"
    )


def _check_residual(view: ModelView, trace: Trace) -> None:
    for layer in range(view.n_layers):
        normed = trace.activations.get(("ln1.out", layer))
        if normed is not None and torch.equal(normed, trace["attn_out", layer]):
            _refuse(view, f"layer {layer}'s norm behind attention under the name ln1 (OLMo 2 here)")
    for layer in range(view.n_layers):
        total = trace.resid[layer] + trace["attn_out", layer]
        if ("mlp_out", layer) in trace:
            total = total + trace["mlp_out", layer]
        if differ(total, trace["resid_post", layer], view.dtype):
            _refuse(view, f"layer {layer}'s residual add (it is not resid + attn_out + mlp_out)")
        if differ(trace["resid_post", layer], trace.resid[layer + 1], view.dtype):
            _refuse(view, f"a component between layer {layer} and the next")


def _check_attention(view: ModelView, trace: Trace) -> None:
    group = view.n_heads // view.n_kv_heads
    for layer in range(view.n_layers):
        value = trace["v", layer].repeat_interleave(group, dim=2)
        pattern = trace["pattern", layer].to(value.dtype)
        b, h, q, k = pattern.shape
        shapes = (b, k, h, view.d_head), (b, q, h, view.d_head)
        fits = (value.shape, trace["z", layer].shape) == shapes  # other shapes: latent attention
        if not fits or differ(
            torch.einsum("bhqk,bkhd->bqhd", pattern, value), trace["z", layer], view.dtype
        ):
            _refuse(view, f"layer {layer}'s attention (z is not pattern @ v)")


def _check_logits(view: ModelView, trace: Trace, tokens: Tensor) -> None:
    candidates = torch.arange(min(64, view.tl.unembed.W_U.shape[-1])).expand(tokens.shape[0], -1)
    with view.quiet():
        logits = view.candidate_logits(trace.resid[-1][:, -1], candidates)
    own = view.logits(tokens)[:, -1].gather(1, candidates.to(view.device))
    if differ(logits, own, view.dtype):
        _refuse(view, "a component between the unembedding and the logits")


def _check_norms(view: ModelView, trace: Trace) -> None:
    """Check that a norm divides by its hook_scale: twice the scale must give half the output."""
    for layer in range(view.n_layers + 1):
        for norm in view.norms(layer):
            if norm == "ln_final":
                continue
            plain = _normed(view, trace, layer, norm, None)
            once = _normed(view, trace, layer, norm, 1.0)
            twice = _normed(view, trace, layer, norm, 2.0)
            zero = _normed(view, trace, layer, norm, 1e30)  # only the bias is left
            if differ(2 * (twice - zero), once - zero, view.dtype):
                _refuse(view, f"layer {layer}'s norm {norm} (it does not divide by its hook_scale)")
            if differ(once, plain, view.dtype):  # Nemotron's on transformer-lens 3
                _refuse(view, f"layer {layer}'s norm {norm} (a hook on its scale changes it)")


def _normed(view: ModelView, trace: Trace, layer: int, norm: str, factor: float | None) -> Tensor:
    """Return the output of a norm whose scale is multiplied, or None for no hook on the scale."""
    out: dict[str, Tensor] = {}
    hooks: dict[Site, Hook] = {(f"{norm}.out", layer): lambda value: out.update(value=value)}
    if factor is not None:
        hooks[f"{norm}.scale", layer] = lambda scale: scale * factor
    try:
        view.replay(trace, trace.resid[layer], layer, hooks, stop=layer + 1)
    except AttributeError:  # the bridge cannot edit the scale of a norm without weights
        _refuse(view, f"layer {layer}'s norm {norm} (its scale cannot be edited)")
    return out["value"]


def _read_biases(view: ModelView, trace: Trace) -> dict[Site, Float[Tensor, "*bias"]]:
    """Read the biases as the output of each linear map for an input of 0, layer by layer."""
    biases: dict[Site, Tensor] = {}
    for layer in range(view.n_layers):
        for site, value in _zero_run(view, trace, layer).items():
            if bool(value.any()):
                biases[site] = value[0, 0].clone()
        for norm in view.norms(layer):
            biases |= _norm_bias(view, norm, layer)
    return biases | _norm_bias(view, "ln_final", view.n_layers)


def _zero_run(view: ModelView, trace: Trace, layer: int) -> dict[Site, Tensor]:
    """Run one block on zeros, with zeros after each nonlinearity, and return each map's output."""
    given: dict[Site, Tensor] = {}
    hooks: dict[Site, Hook] = {}

    def keep(site: Site) -> None:
        hooks[site] = lambda value: given.update({site: value.detach().clone()})

    def zero(site: Site) -> None:
        hooks[site] = torch.zeros_like

    for norm in view.norms(layer):
        zero((f"{norm}.out", layer))
    outputs = [output_site(view, name, layer) for name in ("attn_out", "mlp_out")]
    for site in [*((name, layer) for name in ("q", "k", "v", "pre", "pre_linear", "z")), *outputs]:
        keep(site)
    # A pattern of zeros must give a z of exactly 0, whatever v is. Otherwise the edit was ignored.
    zero(("pattern", layer))
    zero(("post", layer))
    hooks = {site: hook for site, hook in hooks.items() if site in view.sites}
    view.replay(trace, torch.zeros_like(trace.resid[layer]), layer, hooks, stop=layer + 1)
    if bool(given.pop(("z", layer)).any()):
        _refuse(view, f"layer {layer}'s attention pattern, whose edits are ignored")
    return given


def _norm_bias(view: ModelView, norm: str, layer: int) -> dict[Site, Tensor]:
    """Return the bias of a norm under its site, if it has one."""
    site = (f"{norm}.out", layer)
    if site not in view.sites:
        return {}
    bias = view.norm_bias(norm, layer)
    return {} if bias is None or not bool(bias.any()) else {site: bias}


def _is_plain_mlp(view: ModelView, trace: Trace, layer: int) -> bool:
    """Return whether `post` is act(pre), times pre_linear where there is one."""
    function = view.activation(layer)
    if function is None or ("pre", layer) not in trace or ("post", layer) not in trace:
        return False
    with torch.no_grad():
        post = function(trace["pre", layer])
    if ("pre_linear", layer) in trace:
        post = post * trace["pre_linear", layer]
    return not differ(post, trace["post", layer], view.dtype)
