"""Use a model for one call at a time, and leave it as it was.

Every public function that takes a model is marked with `uses_model`. Its outermost call on a model
waits for its turn, because the hooks and modes of one call would act in the passes of another
thread, and opens a `Scope` (`core.undo`), whose changes are taken back whatever ends the call.
`ModelHeld` does the same for a `with` block of the caller's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from cdt_lens.core.errors import InputError
from cdt_lens.core.undo import Scope, Undo, unbroken
from cdt_lens.models.view import ModelView, is_model, view_of

P = ParamSpec("P")
R = TypeVar("R")


class _Turns:
    """Whose turn it is to use a model.

    Attributes:
        lock: held by the thread whose call runs.
        held_by: the thread in which a `with` block of the caller's has changed the model, or None.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.held_by: int | None = None


_TURNS: weakref.WeakKeyDictionary[nn.Module, _Turns] = weakref.WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def _turns_of(model: nn.Module) -> _Turns:
    # Two bridges may share one Hugging Face model.
    shared = getattr(model, "original_model", model)
    with _TURNS_LOCK:
        return _TURNS.setdefault(shared, _Turns())


def uses_model(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function with the parameter `model` wait for its turn, and leave the model as it was.

    Args:
        function: the function. Its model is a TransformerLens model or a `ModelView`.

    Returns:
        The function. It raises `InputError` while another thread's `with` block holds the model.
    """
    place = list(inspect.signature(function).parameters).index("model")

    @functools.wraps(function)
    def in_turn(*args: P.args, **kwargs: P.kwargs) -> R:
        model = kwargs["model"] if "model" in kwargs else (*args, *[None] * place)[place]
        model = model.tl if isinstance(model, ModelView) else model
        if not is_model(model):  # the function refuses it
            return function(*args, **kwargs)
        scope = Scope()
        failed = True
        try:
            scope.open()
            _take_turn(scope, model)
            _remember(scope, model)
            result = function(*args, **kwargs)
            failed = False
            return result
        finally:
            scope.close(failed)

    return in_turn


def _take_turn(scope: Scope, model: Any) -> _Turns:
    turns = _turns_of(model)
    scope.take(turns.lock)
    if turns.held_by not in (None, threading.get_ident()):
        raise InputError(
            "model: another thread runs `with adapter.applied(model)`, so its values are not the "
            "model's own. Wait for the end of that block, or use adapter.apply(model), which holds "
            "for all threads"
        )
    return turns


@unbroken
def _remember(scope: Scope, model: Any) -> None:
    """Announce what TransformerLens and torch change during a pass and restore themselves."""
    owners = [(model.cfg, "default_prepend_bos"), (model.tokenizer, "padding_side")]
    for owner, name in owners:
        if hasattr(owner, name):
            scope.at_end(partial(setattr, owner, name, getattr(owner, name)))
    scope.at_end(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    # Other libraries replace the filters for a while, and may be interrupted in doing so.
    scope.if_failed(partial(setattr, warnings, "filters", warnings.filters))
    for kind in {"cpu", *(p.device.type for p in model.parameters())} - {"meta"}:
        if torch.is_autocast_enabled(kind):
            # Scores are computed in the type of the model.
            whole = torch.autocast(kind, enabled=False)
            scope.at_end(partial(whole.__exit__, None, None, None))
            whole.__enter__()
    if torch.get_default_dtype() is not torch.float32:
        # Scores and the tables of examples have torch's usual type.
        scope.at_end(partial(torch.set_default_dtype, torch.get_default_dtype()))
        torch.set_default_dtype(torch.float32)
    if torch.is_inference_mode_enabled() and not any(p.is_inference() for p in model.parameters()):
        # Gradients need tensors that were made outside of the caller's inference mode.
        outside = torch.inference_mode(False)
        scope.at_end(partial(outside.__exit__, None, None, None))
        outside.__enter__()
        torch.set_grad_enabled(False)


class ModelHeld(contextlib.AbstractContextManager[None]):
    """Change a model for a `with` block of the caller's, in which other threads do not use it.

    Args:
        model: the model.
        change: changes the model, and returns the function that takes the change back.

    Raises:
        InputError: another thread's block holds the model.
    """

    def __init__(self, model: nn.Module | ModelView, change: Callable[[], Undo]) -> None:
        self._model = view_of(model).tl
        self._change = change
        self._scope = Scope()

    def __enter__(self) -> None:
        try:
            self._scope.open()
            turns = _take_turn(self._scope, self._model)
            self._begin(turns)
        except BaseException:
            self._scope.close(failed=True)
            raise

    @unbroken
    def _begin(self, turns: _Turns) -> None:
        self._scope.at_end(partial(setattr, turns, "held_by", turns.held_by))
        self._scope.at_end(self._change())
        turns.held_by = threading.get_ident()
        self._scope.release()

    @unbroken
    def __exit__(self, *error: object) -> None:
        self._scope.close(failed=error[0] is not None)
