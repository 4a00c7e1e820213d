"""Without a launcher nothing is shared out; two processes are in tests/test_two_processes.py."""

from __future__ import annotations

from typing import Any

import torch
from helpers.tiny_models import build, prompts

from cdt_lens.core import processes as distributed


def test_alone_nothing_is_started(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    value: Any = torch.arange(3.0)
    assert distributed.shard() == (0, 1)
    assert distributed.is_main()
    assert distributed.sum_over_processes(value) is value
    assert distributed.gather_items([1, 2]) == [1, 2]
    distributed.wait_for_all()
    assert not torch.distributed.is_initialized()
    assert build("gpt2")(prompts(1, 3)).logits.shape == (1, 3, 128)
