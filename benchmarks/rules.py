"""Rule sets compared on IOI: rank correlation with exact ablation, and the areas under the curve.

    python benchmarks/rules.py models/smollm2-135m      # docs/results/methods.md

Scores are fitted on 16 training prompts; circuits are measured on 16 validation prompts.
"""

from __future__ import annotations

import sys

import cdt_lens as cdt

RULES = {
    "stable": cdt.PRESETS["stable"],
    "attention decomposed": cdt.Rules(attention="decomposed"),
    "frozen norm": cdt.Rules(norm="frozen"),
    "linear": cdt.PRESETS["linear"],
    "official": cdt.PRESETS["official"],
}


def main() -> None:
    model = cdt.load_model(sys.argv[1])
    task = cdt.load_task("ioi", tokenizer=model.tokenizer)
    train, valid = task.train.balanced(16), task.valid.balanced(16)
    baseline = cdt.mean_activations(model, task.train, progress=False)
    exact = cdt.exact_ablation(model, train, baseline, progress=False)
    scored = {"ablation": exact}
    for name, rules in RULES.items():
        try:
            scored[name] = cdt.score_heads(model, train, baseline, rules=rules, progress=False)
        except cdt.NonFiniteError as error:
            print(f"{name}: refused: {error}")
    for name, scores in scored.items():
        agreement = cdt.compare_scores(scores, exact)
        line = f"{name:22s} Spearman {agreement.spearman:.3f} Pearson {agreement.pearson:.3f}"
        for by in ("magnitude", "signed"):
            curve = cdt.faithfulness_curve(
                model, scores, valid, baseline, by=by, draws=1, progress=False
            )
            line += f" | {by}: CPR {curve.cpr:.3f} CMD {curve.cmd:.3f}"
        print(line)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/rules.py MODEL")
    main()
