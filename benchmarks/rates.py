"""Which learning rate for which scope: validation accuracy and loss after two short epochs.

    python benchmarks/rates.py runs/nusax/proxy --data data --language indonesian

Test data is not read. Head scopes share a rate, so that random heads stand for all of them.
"""

from __future__ import annotations

import argparse
import warnings

import torch

import cdt_lens as cdt
from cdt_lens.circuits.circuit import random_heads
from cdt_lens.experiments.inputs import with_train

RATES = {
    "random": (1e-3, 3e-3),
    "full": (3e-5, 1e-4),
    "norms": (1e-3, 5e-3),
    "lora": (3e-4, 1e-3, 3e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("proxy")
    parser.add_argument("--data", default=None)
    parser.add_argument("--language", default="indonesian")
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scopes", nargs="+", default=list(RATES), choices=list(RATES))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = cdt.load_model(args.proxy, backend="bridge", dtype=getattr(torch, args.dtype))
    task = cdt.load_task("nusax-senti", args.language, tokenizer=model.tokenizer, folder=args.data)
    task = with_train(task, args.examples, 0)
    heads = random_heads(args.heads, model.cfg.n_layers, model.cfg.n_heads, seed=0)
    print("| scope | rate | accuracy before | after | loss | seconds |")
    for scope in args.scopes:
        for rate in RATES[scope]:
            result = cdt.finetune(
                model, task, heads=heads, scope=scope, epochs=2, learning_rate=rate,
                evaluate_every=2, progress=False,
            )  # fmt: skip
            first, last = result.history.iloc[0], result.history.iloc[-1]
            print(
                f"| {scope} | {rate:g} | {first['target_accuracy']:.2f} "
                f"| {last['target_accuracy']:.2f} | {last['target_loss']:.3f} "
                f"| {result.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
