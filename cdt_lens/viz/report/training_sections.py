"""The sections of a report about fine-tuning and transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cdt_lens.finetuning.adapt_result import AdaptResult
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.tasks.intervals import share_interval
from cdt_lens.viz import training_tables
from cdt_lens.viz.report.sections import Section
from cdt_lens.viz.training_figures import (
    adaptation,
    learning_curve,
    measures,
    measures_of,
    trade_off,
    trained_heads,
)
from cdt_lens.viz.training_tables import finished, runs_of, untouched
from cdt_lens.viz.words import Number, duration, mean_and_spread, score


def fine_tune_section(result: FineTuneResult, id: str, _: Sequence[object]) -> Section:
    """Return the learning curve of one run, its trained heads, its history and options."""
    before, after = result.before, result.after
    drawn = [learning_curve(result), *([trained_heads(result)] if result.heads else [])]
    tables = [training_tables.history_table(result)]
    if result.options:
        tables.append(training_tables.settings_table(result.options, caption="Training options"))
    name = f"Fine-tuning: {result.scope}"
    return Section(
        title=name,
        headline=(
            _change(before["target_accuracy"], after["target_accuracy"]),
            f"target validation accuracy, before and after training {result.scope}",
        ),
        facts=_training_facts(result),
        figures=tuple(drawn),
        tables=tuple(tables),
        provenance=_origin(name, result.provenance),
    )


def transfer_section(result: TransferResult, id: str, _: Sequence[object]) -> Section:
    """Return the scopes on every target: trade-off, accuracies, tables, automatic choice."""
    tables = [training_tables.comparison_table(result)]
    compared = "decision" if "decision" in result.scopes else result.scopes[0]
    if result.per_example and len(result.scopes) > 1:
        tables.append(training_tables.differences_table(result, compared))
    if len(result.auto):
        tables.append(training_tables.choices_table(result))
    if len(result.cells):
        tables.append(training_tables.runs_table(result))
    for entries, caption in ((result.discovery, "Discovery"), (result.settings, "Settings")):
        if entries:
            tables.append(training_tables.settings_table(entries, caption=caption))
    name = f"Transfer: {result.task} from {result.proxy}"
    return Section(
        title=name,
        headline=_outcome(result),
        facts=_transfer_facts(result),
        figures=(trade_off(result), measures(result)),
        changes=training_tables.disagreements_table(result, compared),
        measures=measures_of(result),
        scopes=result.scopes,
        tables=tuple(tables),
        provenance=_origin(name, result.provenance),
    )


def adapt_section(result: AdaptResult, id: str, _: Sequence[object]) -> Section:
    """Return what an adaptation gained and lost, what was tried, and which answers changed."""
    target = result.languages.iloc[0]
    tables = [training_tables.languages_table(result)]
    texts = training_tables.texts_table(result)
    if texts is not None:
        tables.append(texts)
    tables.append(training_tables.trials_table(result))
    if result.settings:
        tables.append(training_tables.settings_table(result.settings, caption="Settings"))
    name = "Adaptation"
    return Section(
        title=name,
        headline=(
            _change(target["before"], target["after"]),
            f"accuracy on {int(target['examples'])} test rows of the target language, before and "
            f"after (95 % interval of the change {training_tables.limits_of(target, 'change')})",
        ),
        facts=_adaptation_facts(result),
        figures=(adaptation(result),),
        tables=tuple(tables),
        changes=training_tables.changes_table(result) if len(result.changes) else None,
        provenance=_origin(name, result.provenance),
    )


def _adaptation_facts(result: AdaptResult) -> dict[str, str]:
    source = result.languages.iloc[1]
    trained = f"{result.trained_parameters:,} of {result.total_parameters:,} numbers"
    share = result.trained_parameters / max(result.total_parameters, 1)
    heads = f"{result.heads} attention heads and the norms; " if result.heads else ""
    facts = {
        "Base model": result.model,
        "What was trained": f"{result.chosen}: {heads}{trained} ({share:.2%})",
        "Source language": f"accuracy {_change(source['before'], source['after'])}",
        "Least share of it to keep": f"{result.keep:.0%}, on validation rows",
        "Adapted model": result.exported or "none",
    }
    return {"Outcome": result.nothing_learnt} | facts if result.nothing_learnt else facts


def _training_facts(result: FineTuneResult) -> dict[str, str]:
    heads, siblings = len(result.heads), len(result.siblings)
    total = result.n_layers * result.n_heads
    facts = {"Scope": result.scope}
    if heads:
        facts["Heads trained"] = f"{heads} of {total} ({heads / total:.1%})"
        facts["Siblings (share a trained K/V slice)"] = str(siblings)
    epochs = result.options.get("epochs")
    kept = f"{result.best_epoch} of {epochs}" if epochs is not None else str(result.best_epoch)
    before, after = result.before["source_accuracy"], result.after["source_accuracy"]
    change = f" ({_change(before, after)})" if np.isfinite(result.retention) else ""
    if result.nothing_learnt:
        facts["Outcome"] = result.nothing_learnt
    return facts | {
        "Parameters trained": training_tables.trained_in_words(result),
        "Best epoch": kept if result.best_epoch else f"{kept} (the untouched weights)",
        "Stopped": result.stopped,
        "Time": duration(result.seconds),
        "Source retention": f"{score(result.retention)}{change}",
    }


def _transfer_facts(result: TransferResult) -> dict[str, str]:
    seeds = result.asked_seeds
    runs = [runs_of(result, t, s) for t in result.targets for s in result.scopes]
    done = sum(map(finished, runs))
    diverged = sum(map(len, runs)) - done
    broken = f"; {diverged} diverged" if diverged else ""
    planned = len(result.targets) * len(result.scopes) * len(seeds)
    before = untouched(result, result.proxy, "accuracy")
    facts = {
        "Task": result.task,
        "Proxy language": f"{result.proxy} (accuracy {score(before)} before)",
        "Targets": f"{len(result.targets)}: {', '.join(result.targets)}",
        "Seeds": ", ".join(map(str, seeds)) or "none yet",
        "Runs finished": f"{done} of {planned}{broken}" if planned else "none yet",
        "Chance (always the commonest label)": _chance(result),
        "Test examples": _test_examples(result),
    }
    chosen = training_tables.right_of(result)
    if chosen:
        right = ", ".join(f"{rule} {words}" for rule, words in chosen.items())
        facts["Automatic choice right"] = right
    return facts


def _chance(result: TransferResult) -> str:
    """Return one number, or one for each target where they differ."""
    by_target = {target: score(result.chance.get(target, np.nan)) for target in result.targets}
    if len(set(by_target.values())) == 1:
        return next(iter(by_target.values()))
    return ", ".join(f"{target} {value}" for target, value in by_target.items())


def _test_examples(result: TransferResult) -> str:
    """Return the number of test examples, and the widest interval that it gives an accuracy."""
    counts = [int(n) for n in result.before["examples"]]
    if not counts or min(counts) < 1:
        return "n/a"
    many = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    low, high = share_interval(min(counts) // 2, min(counts))
    return f"{many} a language (95 % interval of an accuracy at most \u00b1{(high - low) / 2:.3f})"


def _outcome(result: TransferResult) -> tuple[str, str]:
    """Return the target accuracy before and after, and that of full, over the finished targets."""
    main = "decision" if "decision" in result.scopes else result.scopes[0]
    ran = set(result.cells["scope"]) if len(result.cells) else set()
    compared = [main, *(["full"] if "full" in ran - {main} else [])]
    rows, done = [], 0
    for target in result.targets:
        runs = [runs_of(result, target, scope) for scope in compared]
        means = [mean_and_spread(part["accuracy"])[0] for part in runs]
        means = [untouched(result, target, "accuracy"), *means]
        if np.isfinite(means).all():
            rows.append(means)
            done += sum(map(finished, runs))
    if not rows:
        return "n/a", f"target accuracy of {main}: no target has finished"
    before, after, *full = np.mean(rows, axis=0)
    over = f"mean of {len(rows)} targets" if len(rows) > 1 else "one target"
    beside = f" (full: {full[0]:.3f})" if full else ""
    asked = len(rows) * len(compared) * len(result.asked_seeds)
    what = "runs" if len(rows) * len(compared) > 1 else "seeds"
    of = f", {done} of {asked} {what}" if done < asked else ""
    words = f"target accuracy, untouched and after {main}{beside}, {over}{of}"
    return _change(before, after), words


def _change(before: Number, after: Number) -> str:
    if np.isnan(before) and np.isnan(after):
        return "n/a"
    return f"{score(before)} \u2192 {score(after)}"


def _origin(name: str, provenance: Any) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return () if provenance is None else ((name, provenance.to_dict()),)
