"""Train the two models of the tutorials: `python tutorials/tiny/make.py` writes them beside itself.

`base` has read English and an invented language of distance 0.4, without labels; `english` is that
model after fine-tuning on the sentiment of English sentences. They are part of the repository, so
that no tutorial has to train them and everyone sees the same numbers. Make them again when the
sentences or the words of `pseudo-sentiment` change.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import cdt_lens as cdt
from cdt_lens.experiments.demo_model import make_demo_model


def main() -> None:
    here = Path(__file__).parent
    make_demo_model(here / "base", distances=["0.4"], steps=600, say=print)
    model = cdt.load_model(here / "base")
    sentiment = cdt.load_task(
        "pseudo-sentiment", "source", tokenizer=model.tokenizer, n=(1500, 150, 300)
    )
    learnt = cdt.finetune(
        model, sentiment, scope="full", epochs=8, batch_size=32, learning_rate=2e-3,
        evaluate_every=2,
    )  # fmt: skip
    print(learnt.history[["epoch", "target_accuracy", "target_loss"]])
    with tempfile.TemporaryDirectory() as place:
        # Without the model card and the task: they name folders of the machine.
        whole = cdt.export(learnt.adapter, here / "base", Path(place, "english"))
        AutoModelForCausalLM.from_pretrained(whole).save_pretrained(here / "english")
        AutoTokenizer.from_pretrained(whole).save_pretrained(here / "english")


if __name__ == "__main__":
    main()
