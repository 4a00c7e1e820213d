"""`finetune`: circuit-targeted supervised fine-tuning (CT-SFT, arXiv 2601.08146), and its controls.

1. The scope names what is trained: the circuit's slices and the norms (`decision`), the same number
   of other heads (`near-zero`, `random`, `random-per-layer`), `norms`, `full` or `lora`.
2. One loop trains it on the target language's examples and judges it on the validation split, of
   the source language too: accuracy after / before there is the retention.
3. The result carries an adapter. The caller's model is put back as it was, unless `keep=True`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from torch import nn

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.core.checked import Fix, checked_arguments
from cdt_lens.core.choices import HEAD_SCOPES, Scope
from cdt_lens.core.errors import (
    CdtLensError,
    CdtLensWarning,
    InputError,
    NonFiniteError,
    UnsupportedModelError,
)
from cdt_lens.core.kept import Behaviour, Say
from cdt_lens.core.undo import take_back_if_failed, unbroken, undoing
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.checkpoints import Checkpoint, Log, record_of
from cdt_lens.finetuning.lora import LowRank
from cdt_lens.finetuning.options import DEFAULT_RATES, TrainingOptions
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.scopes import (
    RACERS,
    ScopeChoice,
    check_scope,
    choose_by_gap,
    choose_by_race,
    scope_heads,
)
from cdt_lens.finetuning.score import Score, estimate
from cdt_lens.finetuning.slices import (
    WeightSlice,
    channel_slices,
    check_slices,
    head_slices,
    norm_weights,
    selected_heads,
    siblings,
)
from cdt_lens.finetuning.tracking import Tracking, check_trackers
from cdt_lens.finetuning.trainable import SlicesAndWholes, Trainable
from cdt_lens.finetuning.trainer import Trained, Trainer
from cdt_lens.models.behaviour import PROMPTS, behaviour_of
from cdt_lens.models.heads import Head
from cdt_lens.models.provenance import Provenance, hashed_once, model_key, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.support import check_caller_hooks, check_supported
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.models.weights import check_trainable, is_bias, own_weights, place
from cdt_lens.tasks.card import TaskCard
from cdt_lens.tasks.evaluate import evaluate
from cdt_lens.tasks.task import Task, check_examples


@checked_arguments
@uses_model
def finetune(
    model: nn.Module | ModelView,
    task: Task,
    *,
    heads: Circuit | Iterable[Head | str] | None = None,
    scope: Scope | Literal["auto"] | None = None,
    source: Task | None = None,
    options: Annotated[TrainingOptions | None, Fix("or give them by name: epochs=5")] = None,
    rule: Literal["gap", "race"] = "gap",
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
    log: str | Path | None = None,
    log_with: Any = None,
    logging_dir: str | Path | None = None,
    keep: bool = False,
    judge: Callable[[], Any] | None = None,
    progress: bool = True,
    **changes: Any,
) -> FineTuneResult:
    """Train part of a model on `task.train`, and evaluate it on `task.valid` after each epoch.

    The model is left as it was, unless `keep=True`.

    Args:
        model: A TransformerLens model or its `ModelView`.
        task: The task in the target language.
        heads: The circuit, or its heads as `Head` or by name such as "L9H6". The scope
            `near-zero` needs a circuit with scores; `norms`, `full` and `lora` need no heads.
        scope: One of `options.SCOPES`, or "auto", which chooses a scope by `rule` from validation
            data before training; the result records the choice. The default is `decision` if heads
            are given; without heads a scope must be named.
        source: The task in the source language. Its validation split measures forgetting; it is
            never trained on.
        options: Training options.
        rule: How "auto" chooses: "gap" (`scopes.choose_by_gap`; needs `source`) decides
            between `decision` and `near-zero`. "race" trains one epoch of each of
            `scopes.RACERS` that can be trained, and takes the best of those that keep
            `least_retention` of the source accuracy.
        checkpoint: A JSON file from which an interrupted run resumes. A finished run removes it.
        keep_checkpoint: Keep the checkpoint of a finished run; the same call then returns the same
            result at once.
        log: A JSON-lines file with one line per step and one per evaluation.
        log_with: Trackers of accelerate that get the same values: "tensorboard", "wandb" or another
            name, "all", a `GeneralTracker`, or a list of these.
        logging_dir: Folder of this run for the files of trackers, which TensorBoard needs. A new
            run takes the place of an earlier one in the same folder.
        keep: Leave the trained values in the model.
        judge: Called once with the best values in the model; its return value becomes
            `result.judged`. For `lora` in half precision this is more exact than the merged,
            rounded adapter.
        progress: Whether to show a progress bar.
        **changes: Training options by name, such as `epochs=5` or `learning_rate=1e-4`.

    Returns:
        The history, the adapter with the values of the best epoch, and what was trained.

    Raises:
        InputError: An option, scope, head or split cannot be trained with, or the package of a
            tracker is missing.
        ArtifactError: The circuit is of another model; the message shows both hashes.
        UnsupportedModelError: The norms are folded, or a weight is missing or tied.
        NonFiniteError: A loss or gradient became NaN or infinite; the message names the step.
    """
    view = view_of(model)
    if scope is None:
        scope = _default_scope(heads)
    if heads is not None and not isinstance(heads, Circuit):
        heads = tuple(heads)  # A race reads them once for each scope.
    options = (options or TrainingOptions()).changed(**changes)
    if rule != "gap" and scope != "auto":
        raise InputError(f"rule={rule!r}: is of scope='auto'; omit it with scope={scope!r}")
    if keep_checkpoint and checkpoint is None:
        raise InputError("keep_checkpoint=True: there is none to keep; give checkpoint= a file")
    trackers = check_trackers(log_with, logging_dir)
    if scope == "auto":
        choice = _choose(view, task, heads, source, options, rule, progress)
        result = finetune(
            view, task, heads=heads, scope=choice.scope, source=source, options=options,
            checkpoint=checkpoint, keep_checkpoint=keep_checkpoint, log=log, log_with=log_with,
            logging_dir=logging_dir, keep=keep, judge=judge, progress=progress,
        )  # fmt: skip
        return replace(result, options={**result.options, "chosen_by": asdict(choice)})
    plan = _plan(view, task, heads, scope, source, options)
    stored = None if checkpoint is None else _checkpoint(Path(checkpoint), plan)
    tracking = _tracking(plan, trackers, logging_dir, stored)
    written = None if log is None else Log(log)
    with tracking:
        result = _run(plan, stored, written, tracking, judge, keep, progress)
    if stored is not None and not keep_checkpoint:
        stored.remove()
    return result


@dataclass(frozen=True)
class _Plan:
    """A training run that was checked: what is trained, on what, and how."""

    view: ModelView
    task: Task
    source: Task | None
    scope: str
    heads: tuple[Head, ...]
    options: TrainingOptions
    made_from: Mapping[str, Any]
    provenance: Provenance


def _default_scope(heads: object) -> Scope:
    if heads is None:
        raise InputError(
            "finetune: expected heads= (a circuit or a list of heads to train) or scope=, such as "
            'scope="full", which trains all weights'
        )
    return "decision"


@hashed_once()
def _plan(
    view: ModelView, task: Task, heads: Circuit | Iterable[Head | str] | None, scope: str,
    source: Task | None, options: TrainingOptions,
) -> _Plan:  # fmt: skip
    """Check everything that can be refused before the first step."""
    check_scope(scope)
    options = _resolved(scope, options)
    check_splits(task, source, options)
    _check_lengths(view, task, source)
    chosen = _chosen(view, scope, heads, options)
    check_trainable(view)
    check_supported(view)
    batch = next(task.train.batches(options.batch_size, apart=view.longrope_limit))
    check_caller_hooks(view, batch.tokens, batch.lengths)
    made_from = _made_from(view, scope, chosen, options, task, source)
    recorded = {"scope": scope, **asdict(options)}
    provenance = provenance_of(view, task.train, options=recorded, seed=options.seed)
    return _Plan(view, task, source, scope, chosen, options, made_from, provenance)


def _run(
    plan: _Plan, stored: Checkpoint | None, log: Log | None, tracking: Tracking,
    judge: Callable[[], Any] | None, keep: bool, progress: bool,
) -> FineTuneResult:  # fmt: skip
    """Train, and restore the model unless the trained values are to stay in it."""
    view, options = plan.view, plan.options
    trainable = make_trainable(view, plan.scope, plan.heads, options)
    first = _lowest_trained(view, trainable) if options.keep_frozen else 0
    with undoing(trainable.restore):
        with trainable.attached():
            trained = Trainer(
                AnswerPass(view, first_layer=first), trainable, plan.task, options, plan.source,
                stored, log, progress, f"{plan.task.name} {plan.scope}", tracking,
            ).run()  # fmt: skip
            judged = None if judge is None else judge()
        learnt = trainable.learnt()
        card = TaskCard.of(plan.task, getattr(view.tl, "tokenizer", None))
        adapter = Adapter(
            plan.scope, plan.heads, learnt.slices, learnt.whole, plan.provenance, card,
            scores=_scores(plan, trained), total_parameters=count_parameters(view),
        )  # fmt: skip
    changed = adapter.changes(view)
    if keep:
        _keep(view, adapter)
    result = _result(view, plan.scope, plan.heads, options, trainable, trained, adapter)
    return replace(result, judged=judged, changed=changed)


def _tracking(
    plan: _Plan, trackers: tuple[Any, ...], folder: str | Path | None, stored: Checkpoint | None
) -> Tracking:
    config = {
        "model": plan.view.name, "task": plan.task.name, "scope": plan.scope,
        "heads": " ".join(map(str, plan.heads)), **asdict(plan.options),
    }  # fmt: skip
    return Tracking(
        trackers, None if folder is None else Path(folder),
        f"{plan.task.name} {plan.scope} {plan.options.seed}", config,
        None if stored is None else record_of(stored.path),
    )  # fmt: skip


def _scores(plan: _Plan, trained: Trained) -> tuple[Score, ...]:
    """Return the validation accuracies before and after, of the target and the source."""
    by_epoch = {row["epoch"]: row for row in trained.history}
    found = []
    for role, task in (("target", plan.task), ("source", plan.source)):
        n = 0 if task is None else len(task.valid)
        if task is not None and n:
            rows = (by_epoch[0], by_epoch[trained.best_epoch])
            pair = (estimate(row[f"{role}_accuracy"], n) for row in rows)
            found.append(Score(role, task.name, "validation", n, *pair))
    return tuple(found)


@uses_model
def drop_stale_checkpoint(
    checkpoint: Path,
    model: nn.Module | ModelView,
    task: Task,
    say: Say,
    *,
    scope: str,
    options: TrainingOptions,
    heads: Circuit | Iterable[Head | str] | None = None,
    source: Task | None = None,
) -> None:
    """Remove a checkpoint that `finetune` would refuse, called with the same arguments.

    Args:
        checkpoint: The JSON file of the checkpoint. It may be missing.
        model: The model to train.
        task: The task to train on.
        say: Receives the reason why the checkpoint is removed.
        scope: One of `options.SCOPES`.
        options: The training options.
        heads: The circuit, or its heads.
        source: The task in the language whose forgetting is followed.

    Raises:
        InputError: `finetune` would refuse the scope or the heads.
        ArtifactError: The checkpoint is damaged, or the circuit is of another model.
    """
    if checkpoint.exists():
        view, options = view_of(model), _resolved(scope, options)
        chosen = _chosen(view, scope, heads, options)
        made_from = _made_from(view, scope, chosen, options, task, source)
        Checkpoint(checkpoint, made_from, _behaviour(view, task)).drop_stale(say)


def _checkpoint(path: Path, plan: _Plan) -> Checkpoint:
    return Checkpoint(path, plan.made_from, _behaviour(plan.view, plan.task))


def _behaviour(view: ModelView, task: Task) -> Behaviour:
    batch = next(task.train.batches(PROMPTS, apart=view.longrope_limit))
    return behaviour_of(view, batch.tokens, batch.lengths)


def _made_from(
    view: ModelView, scope: str, chosen: tuple[Head, ...], options: TrainingOptions,
    task: Task, source: Task | None,
) -> dict[str, Any]:  # fmt: skip
    """Return everything that changes a number of a training run: the key of its checkpoint."""
    return {
        "scope": scope, "heads": [str(head) for head in chosen], "options": options.as_key(),
        "model": model_key(view), "task": task.hash,
        "source": None if source is None else source.hash,
    }  # fmt: skip


def _resolved(scope: str, options: TrainingOptions) -> TrainingOptions:
    """Return the options with the values that depend on the scope."""
    if options.learning_rate is None:
        options = options.changed(learning_rate=DEFAULT_RATES[scope])
    # The scope `norms` trains all of them, whatever the head scopes of a run train.
    return options.changed(norms="all") if scope == "norms" else options


def _chosen(
    view: ModelView, scope: str, heads: Circuit | Iterable[Head | str] | None,
    options: TrainingOptions,
) -> tuple[Head, ...]:  # fmt: skip
    """Return the heads that are trained: with kv="groups" whole groups of them."""
    chosen = scope_heads(scope, _circuit(view, heads), seed=options.seed)
    return selected_heads(view, chosen, kv=options.kv)


def _choose(
    view: ModelView, task: Task, heads: Circuit | Iterable[Head | str] | None,
    source: Task | None, options: TrainingOptions, rule: str, progress: bool,
) -> ScopeChoice:  # fmt: skip
    """Choose a scope before the run, on validation data only."""
    if not len(task.valid):
        raise InputError(f"scope 'auto': {task.name} has no validation split to choose by")
    if rule == "gap":
        if source is None:
            raise InputError("scope 'auto' by the gap rule: pass source=, the task it came from")
        source.valid.require_some()
        before = evaluate(view, source.valid, source).accuracy
        now = evaluate(view, task.valid, task).accuracy
        return choose_by_gap(before, now, task.valid.chance)
    check_splits(task, source, options)  # what no scope can be trained with
    raced = _race(view, task, heads, source, options, progress)
    kept = None if source is None else evaluate(view, source.valid, source).accuracy
    return choose_by_race(raced, least_retention=options.least_retention, source_before=kept)


def _race(
    view: ModelView, task: Task, heads: Circuit | Iterable[Head | str] | None,
    source: Task | None, options: TrainingOptions, progress: bool,
) -> dict[Scope, dict[str, Any]]:  # fmt: skip
    """Train every scope that can be trained for one epoch, and return the last row of each."""
    short = options.changed(epochs=1, patience=None, evaluate_every=1)
    raced: dict[Scope, dict[str, Any]] = {}
    refused: CdtLensError | None = None
    for scope in _racers(view, heads):
        try:
            result = finetune(
                view, task, heads=heads, scope=scope, source=source, options=short,
                progress=progress,
            )  # fmt: skip
        except (InputError, NonFiniteError, UnsupportedModelError) as error:
            refused = error
            if not isinstance(error, NonFiniteError):  # that one was trained, and lost
                warnings.warn(f"the race leaves out {scope}: {error}", CdtLensWarning, stacklevel=1)
            continue
        raced[scope] = result.to_dataframe().to_dict("records")[-1]  # type: ignore[assignment]
    if refused is not None and not raced:
        raise refused
    return raced


def _racers(view: ModelView, heads: Circuit | Iterable[Head | str] | None) -> list[Scope]:
    """Return the scopes of `RACERS` that this model and these heads allow."""
    scored = isinstance(heads, Circuit) and heads.scores is not None
    possible = {
        "decision": heads is not None,
        "near-zero": scored,
        "lora": view.is_bridge and find_spec("peft") is not None,
    }
    return [scope for scope in RACERS if possible.get(scope, True)]


def check_splits(task: Task, source: Task | None, options: TrainingOptions) -> None:
    """Refuse data that cannot be learnt from, or not judged as asked.

    Raises:
        InputError: an empty split, one with a single label, or no labels for macro-F1.
    """
    task.train.require_some()
    task.warn_unless_held_out()
    present = [label for label, n in task.train.counts.items() if n]
    if len(present) < 2:
        raise InputError(
            f"{task.train.name}: all {len(task.train)} examples have the label {present[0]!r}; "
            "there is nothing to tell apart. Add examples of another label"
        )
    if options.patience is not None and not len(task.valid):
        raise InputError(
            f"patience={options.patience}: {task.name} has no validation split to judge by"
        )
    if options.least_retention is not None and source is None:
        raise InputError(
            f"least_retention={options.least_retention:g}: pass source=, the task in the language "
            "whose accuracy is to be kept"
        )
    if options.metric == "macro_f1" and not task.verbalizer_ids:
        raise InputError(f"metric='macro_f1': {task.name} has no verbalizer; use accuracy")
    if source is not None:
        source.valid.require_some()


def _check_lengths(view: ModelView, task: Task, source: Task | None) -> None:
    """Refuse before training what would fail in the middle, or read past the learned positions."""
    splits = (task.train, task.valid, *(() if source is None else (source.valid,)))
    for examples in filter(len, splits):
        check_examples(view, examples)
        longest = max((example.length for example in examples), default=0)
        view.check_length(longest, f"{examples.name}: ")


def make_trainable(
    view: ModelView, scope: str, heads: tuple[Head, ...], options: TrainingOptions
) -> Trainable:
    """What `scope` trains.

    Raises:
        UnsupportedModelError: a weight is missing, tied, or not what the model runs.
    """
    if scope == "lora":
        return LowRank(
            view, rank=options.lora_rank, alpha=options.lora_alpha, seed=options.seed,
            modules=options.lora_modules,
        )  # fmt: skip
    if scope == "full":
        return SlicesAndWholes(view, (), tuple(own_weights(view)))
    if scope == "norms":
        return SlicesAndWholes(view, (), tuple(norm_weights(view, "all")))
    slices = _slices(view, heads, options)
    check_slices(view, slices)
    return SlicesAndWholes(view, slices, tuple(norm_weights(view, options.norms, heads)))


def _slices(
    view: ModelView, heads: tuple[Head, ...], options: TrainingOptions
) -> tuple[WeightSlice, ...]:
    """Return the slices of the heads, and those of the MLP channels beside them."""
    slices = head_slices(view, heads, kv=options.kv)
    if options.channels:
        seed, choice = options.seed, options.channel_choice
        slices += channel_slices(view, options.channels, choice=choice, seed=seed)
    return tuple(part for part in slices if options.biases or not is_bias(part.name))


def count_trained(
    view: ModelView, scope: str, heads: tuple[Head, ...], options: TrainingOptions
) -> int:
    """Return how many parameters a scope trains, without making anything to train.

    Args:
        view: The model.
        scope: One of `options.SCOPES`, but not "lora".
        heads: The heads of a head scope.
        options: The training options.
    """
    if scope == "full":
        return count_parameters(view)
    norms = norm_weights(view, "all" if scope == "norms" else options.norms, heads)
    slices = _slices(view, heads, options) if heads else ()
    return sum(value.numel() for value in norms.values()) + sum(
        part.whole[0].numel() * len(part.index) for part in slices
    )


def _circuit(view: ModelView, heads: Circuit | Iterable[Head | str] | None) -> Circuit | None:
    if heads is None:
        return None
    if isinstance(heads, Circuit):
        heads.check_model(view)
        return heads
    return Circuit(view.heads(heads), view.n_layers, view.n_heads)


def _lowest_trained(view: ModelView, trainable: Trainable) -> int:
    """The first layer with something to train; 0 where the embedding is trained too."""
    learnt = getattr(trainable, "slices", ())
    layers = [part.layer for part in learnt]
    for name in getattr(trainable, "wholes", ()):
        if name.startswith("blocks."):
            layers.append(int(name.split(".")[1]))
        elif not name.startswith(("ln_final", "unembed")):
            return 0
    return min(layers, default=0)


@unbroken
def _keep(view: ModelView, adapter: Adapter) -> None:
    """Leave the learnt values in the model, unless the call fails after all."""
    take_back_if_failed(adapter.apply(view, check=False).remove)


def _result(
    view: ModelView, scope: str, heads: tuple[Head, ...], options: TrainingOptions,
    trainable: Trainable, trained: Trained, adapter: Adapter,
) -> FineTuneResult:  # fmt: skip
    return FineTuneResult(
        scope=scope,
        heads=heads,
        siblings=siblings(view, heads, kv=options.kv) if scope in HEAD_SCOPES else (),
        n_layers=view.n_layers,
        n_heads=view.n_heads,
        trained_parameters=sum(master.value.numel() for master in trainable.masters),
        total_parameters=count_parameters(view),
        options=asdict(options),
        history=pd.DataFrame(trained.history),
        best_epoch=trained.best_epoch,
        stopped=trained.stopped,
        seconds=trained.seconds,
        provenance=adapter.provenance,
        adapter=adapter,
    )


def count_parameters(view: ModelView) -> int:
    """Parameters of the model, a tied embedding counted once."""
    own = own_weights(view)
    seen = {place(value): value.numel() for value in own.values()}
    total = sum(seen.values())
    embedding, end = own["embed.W_E"], own["unembed.W_U"]
    separate = place(embedding) != place(end) and embedding.shape == end.T.shape
    if separate and not view.is_bridge and bool((embedding == end.T).all()):
        total -= end.numel()
    return total
