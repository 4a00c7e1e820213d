"""Provide planted circuits: tiny models whose circuit is known by construction.

`planted_circuit("hand-or")` returns a tiny model, examples, and the heads of the circuit. The
trained circuits (`trained_circuits`) are as noisy as those of a real model. In the circuits that
are built by hand (`hand_built_circuits`), every head does one thing. Each of them shows one way in
which heads share the work: they cancel, duplicate, back up or need one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
from jaxtyping import Bool
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from cdt_lens.core import display
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import FromZero, Seed
from cdt_lens.core.errors import InputError
from cdt_lens.core.scratch import temporary_folder
from cdt_lens.models.heads import all_heads, heads_to_mask, mask_to_heads
from cdt_lens.models.hugging_face import third_party_noise_off
from cdt_lens.models.loading import Backend, load_model
from cdt_lens.models.view import view_of
from cdt_lens.planted.hand_built_circuits import HAND_BUILT, plant_by_hand
from cdt_lens.planted.planting import SPECIAL, Planting
from cdt_lens.planted.trained_circuits import TRAINED, plant_by_training
from cdt_lens.tasks.task import Examples

PLANTED: Mapping[str, str] = {
    **{f"trained-{name}": text for name, text in TRAINED.items()},
    **{f"hand-{name}": spec.what for name, spec in HAND_BUILT.items()},
}


@dataclass(frozen=True, eq=False)
class PlantedCircuit:
    """A model with a known circuit, and examples to find it with.

    Attributes:
        name: name of the circuit in `PLANTED`.
        model: the TransformerLens model.
        train: examples to score heads on.
        valid: other examples, held out.
        truth: True where a head is in the circuit by construction.
        why: how the circuit works.
    """

    name: str
    model: nn.Module = field(repr=False)
    train: Examples = field(repr=False)
    valid: Examples = field(repr=False)
    truth: Bool[Tensor, "layer head"] = field(repr=False)
    why: str

    def __repr__(self) -> str:
        heads = display.few(mask_to_heads(self.truth))
        return display.line(self, self.name, f"{heads} of {self.truth.numel()} heads")

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row for each head, with its name and whether it is in the circuit."""
        heads = [str(head) for head in all_heads(*self.truth.shape)]
        return pd.DataFrame({"head": heads, "in_circuit": self.truth.flatten().tolist()})

    def _repr_html_(self) -> str:
        return display.html(f"{self.name}: {self.why}", self.to_dataframe())


@checked_arguments
def planted_circuit(
    name: str, *, seed: Seed = 0, backend: Backend = "auto", noise: FromZero | None = None
) -> PlantedCircuit:
    """Create a planted circuit. Its model is ready for `score_heads`.

    Args:
        name: one of `PLANTED`.
        seed: for a trained circuit, seed of the weights and prompts. Training takes seconds, once
            for each process. For a circuit that is built by hand, seed of the places of the heads
            and of the prompts.
        backend: as for `load_model`.
        noise: for a trained circuit, the norm of the other heads' output weights, relative to the
            planted heads'. None uses 0.5.

    Returns:
        The circuit.

    Raises:
        InputError: the name is unknown, the noise is negative or does not apply, or no training
            with this seed succeeds.
    """
    if name not in PLANTED:
        raise InputError(f"planted_circuit: {name!r}: expected one of {', '.join(PLANTED)}")
    kind, _, short = name.partition("-")
    if noise is not None and (kind != "trained" or not noise >= 0):
        raise InputError(
            f"planted_circuit: noise={noise} for {name}: expected a number of at least 0, for a "
            "trained circuit. Omit noise for the others."
        )
    if kind == "hand":
        planting = plant_by_hand(short, seed=seed)
    else:
        planting = plant_by_training(short, seed=seed, noise=0.5 if noise is None else noise)
    model = _wrapped(planting, name, backend)
    view = view_of(model)
    truth = heads_to_mask(planting.heads, view.n_layers, view.n_heads)
    return PlantedCircuit(name, model, planting.train, planting.valid, truth, planting.why)


def _wrapped(planting: Planting, name: str, backend: Backend) -> nn.Module:
    """Return the TransformerLens model, loaded from a Hugging Face folder like any other."""
    pad, begin, end = SPECIAL
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(planting.words)}, unk_token=pad))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, unk_token=pad, bos_token=begin, eos_token=end
    )
    with temporary_folder() as work:
        folder = work / name
        with third_party_noise_off():
            planting.hf_model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return load_model(folder, backend=backend, device="cpu")
