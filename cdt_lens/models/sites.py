"""Name the activations that rules and recordings need, alike for both model classes.

A site is (name, layer). Most sites are TransformerLens hook points. A norm also has sites for its
input and its output, because its hook point lies before its weight and bias. The sites "attn.in"
and "mlp.in", the inputs of attention and MLP, are read-only: `HookedTransformer` passes the first
three times. The token embedding is the site ("embed", 0).

Granite multiplies the outputs of attention and MLP before it adds them to the residual stream.
There, "attn_out" and "mlp_out" are what is added, and "attn.out" and "mlp.out" the outputs of the
projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

# A site is an activation of one layer: (name, layer). The final norm's layer is n_layers.
Site = tuple[str, int]
Hook = Callable[[Tensor], Tensor | None]

_HOOK_POINTS = {
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "pre": "mlp.hook_pre",
    "pre_linear": "mlp.hook_pre_linear",
    "post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
# Norms have three sites each: <norm>.in, <norm>.scale, <norm>.out
NORMS = {
    "ln1": "ln1",
    "ln2": "ln2",
    "ln1_post": "ln1_post",
    "ln2_post": "ln2_post",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "ln_final": "ln_final",
}


_HIDDEN = frozenset({"pre", "pre_linear", "post"})
_OF_THE_MLP = _HIDDEN | {"mlp_out", "ln2", "ln2_post"}


@dataclass(frozen=True)
class Place:
    """The module that gives access to a site.

    Attributes:
        module: the module to hook.
        kind: "point" for a TransformerLens hook point, "input" or "output" for the module's own
            input or output.
        factor: what the block multiplies an output by. The activation is the product.
    """

    module: nn.Module
    kind: Literal["point", "input", "output"]
    factor: float = 1.0

    def attach(self, hook: Hook) -> Any:
        """Register a hook.

        Args:
            hook: a function of the activation that returns a new value, or None to keep it.

        Returns:
            The handle that removes the hook.
        """
        if self.kind == "input":
            return self.module.register_forward_pre_hook(
                lambda _, args, kwargs: _first(hook, args, kwargs), with_kwargs=True
            )
        if self.kind == "output":
            # The output itself comes before its product, whose hooks have to see every change.
            return self.module.register_forward_hook(
                lambda _m, _a, out: _scaled(hook, out, self.factor), prepend=self.factor == 1
            )
        # The bridge stores heads flat and presents them split, so a raw hook has to convert.
        conversion = getattr(self.module, "hook_conversion", None)
        if conversion is None:
            return self.module.register_forward_hook(lambda _m, _a, out: hook(out))

        def converted(_module: nn.Module, _args: Any, out: Tensor) -> Tensor | None:
            result = hook(conversion.convert(out))
            return None if result is None else conversion.revert(result)

        return self.module.register_forward_hook(converted)


def find_sites(model: Any, n_layers: int) -> dict[Site, Place]:
    """Find every site of a TransformerLens model.

    Args:
        model: the model.
        n_layers: number of layers. It is also the layer of the final norm.

    Returns:
        The place of each site.
    """
    places: dict[Site, Place] = {}
    embedding = _resolve(model, "hook_embed")
    # Granite multiplies the embedding outside of the bridge's component, whose hook never fires.
    config = getattr(getattr(model, "original_model", None), "config", None)
    if embedding is not None and getattr(config, "embedding_multiplier", None) is None:
        places["embed", 0] = Place(embedding, "point")
    for layer, block in enumerate(model.blocks):
        # HookedTransformer has some MLP hook points in attention-only blocks, but none fires.
        mlp = getattr(block, "mlp", None)
        absent = _OF_THE_MLP if mlp is None else _HIDDEN if is_routed(mlp) else frozenset()
        for name, path in _HOOK_POINTS.items():
            if name in absent:
                continue
            point = _resolve(block, path)
            if point is not None:
                places[name, layer] = Place(point, "point")
        attention = _resolve(block, "attn")
        if attention is not None:
            places["attn.in", layer] = Place(attention, "input")
        if isinstance(mlp, nn.Module):
            places["mlp.in", layer] = Place(mlp, "input")
        places |= _multiplied_outputs(block, layer)
        for name, path in NORMS.items():
            if name in absent:
                continue
            _add_norm(places, name, layer, _resolve(block, path))
    _add_norm(places, "ln_final", n_layers, getattr(model, "ln_final", None))
    return places


def is_routed(mlp: object) -> bool:
    """Return whether an MLP is a mixture of experts of a bridge.

    Args:
        mlp: the MLP of a block.

    Returns:
        True for a mixture of experts, whose `hook_pre` and `hook_post` are its input and output.
    """
    return type(mlp).__name__ == "MoEBridge" and not getattr(mlp, "bound_dense", False)


def _multiplied_outputs(block: Any, layer: int) -> dict[Site, Place]:
    """Find the outputs of attention and MLP in a block that multiplies them (Granite)."""
    factor: Any = getattr(getattr(block, "original_component", None), "residual_multiplier", None)
    places: dict[Site, Place] = {}
    if factor is None:
        return places
    for name in ("attn", "mlp"):
        module = _resolve(block, name)
        if module is not None:
            places[f"{name}.out", layer] = Place(module, "output")
            places[f"{name}_out", layer] = Place(module, "output", float(factor))
    return places


def _resolve(module: Any, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


def _add_norm(places: dict[Site, Place], name: str, layer: int, norm: nn.Module | None) -> None:
    # A model without a norm has an identity here, which has no scale to hook.
    point = getattr(norm, "hook_scale", None)
    if norm is None or not isinstance(point, nn.Module):
        return
    places[f"{name}.in", layer] = Place(norm, "input")
    places[f"{name}.scale", layer] = Place(point, "point")
    places[f"{name}.out", layer] = Place(norm, "output")


def _scaled(hook: Hook, out: Any, factor: float) -> Any:
    """Pass an output times `factor` to `hook`; attention returns its pattern beside it."""
    value = out[0] if isinstance(out, tuple) else out
    result = hook(value if factor == 1 else value * factor)
    if result is None:
        return None
    result = result if factor == 1 else result / factor
    return (result, *out[1:]) if isinstance(out, tuple) else result


def _first(
    hook: Hook, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pass the first argument to `hook`; some callers give it by name."""
    if args:
        result = hook(args[0])
        return None if result is None else ((result, *args[1:]), kwargs)
    name = next(iter(kwargs))
    result = hook(kwargs[name])
    return None if result is None else (args, {**kwargs, name: result})
