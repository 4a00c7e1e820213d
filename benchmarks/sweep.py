"""Cost of an all-heads sweep, in plain forward passes; and its peak memory at two vocabularies.

    python benchmarks/sweep.py                      # GPT-2-small shape, 4 prompts of 16 tokens
    python benchmarks/sweep.py --memory             # extra memory of a sweep, two vocabularies
    python benchmarks/sweep.py --processes          # two processes of one thread against one

One pass is the model's blocks without the unembedding, timed in the same run at the same number of
rows (12 sources x 4 prompts) and divided by the number of sources: what one source would cost from
the first layer on. Each source propagated from its own layer on gives 78 for 12 x 12 heads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cdt_lens.core.processes import wait_for_all
from cdt_lens.decomposition.baseline import zero_baseline
from cdt_lens.decomposition.decompose import irrelevant_logits
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import PRESETS
from cdt_lens.models.heads import all_heads
from cdt_lens.models.loading import _bridge, _hooked, has_hooked_transformer
from cdt_lens.models.support import check_supported
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.task import Example, Examples

N_PROMPTS, N_TOKENS = 4, 16


def gpt2_small(d_vocab: int, backend: str) -> ModelView:
    """A random model of GPT-2 small's shape."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=d_vocab, n_positions=64, bos_token_id=1, eos_token_id=1, n_ctx=64,
        attn_implementation="eager",
    )  # fmt: skip
    hf_model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # biases other than 0, so that their rule is at work
        for parameter in hf_model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    transformers.logging.set_verbosity_error()
    words = _tokenizer()
    if backend == "hooked":
        return ModelView(_hooked(hf_model, words, "cpu", torch.float32, None))
    return ModelView(_bridge(hf_model, words, "cpu", torch.float32))


def _tokenizer() -> Any:
    """A tokenizer of a few words: the model classes want one, the benchmark uses none."""
    words = WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words),
        unk_token="a",
        pad_token="a",
        bos_token="b",
        eos_token="b",
    )
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        return transformers.AutoTokenizer.from_pretrained(folder)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def prompts(d_vocab: int, n: int = N_PROMPTS) -> Examples:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, d_vocab, (n, N_TOKENS), generator=generator).tolist()
    items = [Example(str(i), tuple(row), "a", (1,), (2,)) for i, row in enumerate(rows)]
    return Examples(tuple(items), ("a",), "random tokens")


def report_cost(backend: str, names: list[str], repeats: int) -> None:
    view = gpt2_small(50257, backend)
    examples = prompts(50257)
    batch = next(examples.batches(N_PROMPTS))
    baseline = zero_baseline(view, examples).for_batch(view, batch)
    heads = all_heads(view.n_layers, view.n_heads)
    rows = view.n_heads * N_PROMPTS
    many = batch.tokens.repeat(view.n_heads, 1)

    def one_pass() -> object:
        return view.run(many)

    for name in names:

        def sweep(rules=PRESETS[name]) -> object:
            engine = Propagator(view, batch.tokens, batch.lengths, baseline, rules)
            return irrelevant_logits(engine, [(head,) for head in heads], batch, rows=rows)

        # Alternating, so that a machine whose speed drifts slows both alike.
        pairs = [(median_seconds(sweep, 1), median_seconds(one_pass, 1)) for _ in range(repeats)]
        ratios = [s / (p / view.n_heads) for s, p in pairs]
        print(
            f"{backend:7s} {name:9s} sweep {statistics.median(s for s, _ in pairs):6.2f} s, "
            f"pass of {rows} rows {statistics.median(p for _, p in pairs):6.3f} s: "
            f"{statistics.median(ratios):5.1f} passes "
            f"(min {min(ratios):.1f}, max {max(ratios):.1f})"
        )


def memory_of(d_vocab: int) -> None:
    """In a fresh process: how much resident memory grows during a sweep (Linux)."""
    view = gpt2_small(d_vocab, "bridge")
    examples = prompts(d_vocab)
    batch = next(examples.batches(N_PROMPTS))
    baseline = zero_baseline(view, examples).for_batch(view, batch)
    # The architecture check unembeds one small batch; it is not part of a sweep.
    check_supported(view)
    heads = [(head,) for head in all_heads(view.n_layers, view.n_heads)]
    before, seen, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen[0] = max(seen[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    engine = Propagator(view, batch.tokens, batch.lengths, baseline, PRESETS["official"])
    irrelevant_logits(engine, heads, batch, rows=48)
    done.set()
    watcher.join()
    print(f"vocabulary {d_vocab}: memory grows by up to {seen[0] - before:.0f} MiB during a sweep")


def report_processes(repeats: int) -> None:
    """Time sweeps of one process and of two in turn; imports and the model do not count."""
    two = [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0",
    ]  # fmt: skip
    ratios = []
    for _ in range(repeats):
        one, both = (_seconds(launcher) for launcher in ([], two))
        ratios.append(one / both)
        print(
            f"one process {one:.1f} s, two processes {both:.1f} s: {one / both:.2f} times as fast"
        )
    print(f"median {statistics.median(ratios):.2f}")


def _seconds(launcher: list[str]) -> float:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, *launcher, __file__, "--share"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return max(float(line.split()[1]) for line in done.stdout.splitlines() if "seconds" in line)


def one_share() -> None:
    """Score all heads on 40 prompts, or this process's share of them, and print the time."""
    torch.set_num_threads(1)
    view = gpt2_small(5_000, "bridge")
    examples = prompts(5_000, 40)
    baseline = zero_baseline(view, examples)
    score_heads(view, examples[:2], baseline, rules="ablation", exact="all", progress=False)
    wait_for_all()
    began = time.perf_counter()
    score_heads(
        view, examples, baseline, rules="ablation", exact="all", batch_size=4, progress=False
    )
    print(f"seconds {time.perf_counter() - began:.3f}", flush=True)


def resident() -> float:
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", nargs="+", default=["official", "stable", "linear", "ablation"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--share", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.vocabulary:
        memory_of(options.vocabulary)
    elif options.share:
        one_share()
    elif options.processes:
        report_processes(options.repeats)
    elif options.memory:
        for d_vocab in (5_000, 200_000):
            command = [sys.executable, __file__, "--vocabulary", str(d_vocab)]
            subprocess.run(command, check=True)
    else:
        for backend in ["hooked"] * has_hooked_transformer() + ["bridge"]:
            report_cost(backend, options.rules, options.repeats)


if __name__ == "__main__":
    main()
