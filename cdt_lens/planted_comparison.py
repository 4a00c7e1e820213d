"""`PlantedComparison`: methods judged on circuits whose heads are known by construction.

Each planted circuit has its own `Comparison`; here they stand side by side, so that one sees which
phenomenon (cancellation, an OR, a head that only moves attention) a method misses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from cdt_lens import comparison_figures, comparison_tables, display
from cdt_lens.artifacts import load_artifact, save_artifact
from cdt_lens.comparison import Comparison
from cdt_lens.errors import ArtifactError
from cdt_lens.markup import figure_html

_FORMAT, _VERSION = "cdt_lens.planted_comparison", 1


@dataclass(frozen=True, eq=False)
class PlantedComparison:
    """Methods compared on planted circuits, by the circuit's name.

    why: what is planted in each circuit, in words.
    """

    circuits: Mapping[str, Comparison]
    why: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return display.line(self, display.few(self.methods), f"on {display.few(self.circuits)}")

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method of any circuit, in order."""
        return tuple(dict.fromkeys(name for each in self.circuits.values() for name in each.names))

    def matrix(self, measure: str = "average_precision") -> pd.DataFrame:
        """A measure by method (rows) and circuit (columns); NaN where the method was refused."""
        columns = {
            name: each.to_dataframe().set_index("method")[measure]
            for name, each in self.circuits.items()
        }
        return pd.DataFrame(columns, dtype=float).reindex(list(self.methods))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a circuit and method, with every number."""
        parts = [each.to_dataframe().assign(circuit=name) for name, each in self.circuits.items()]
        rows = [row for part in parts for row in part.to_dict("records")]
        names = [c for c in (parts[0].columns if parts else ()) if c != "circuit"]
        return pd.DataFrame(rows, columns=["circuit", *names])

    def table(self, measure: str = "average_precision") -> pd.DataFrame:
        """A measure as text, `*` at the best of a circuit; a mean only over all circuits."""
        return comparison_tables.planted_plain(self, measure)

    def plot(self) -> Figure:
        """AUROC and average precision of each method on each circuit."""
        return comparison_figures.planted(self)

    def _repr_html_(self) -> str:
        return str(
            comparison_tables.planted_html(self, "average_precision") + figure_html(self.plot())
        )

    def save(self, path: str | Path) -> Path:
        """Save as JSON, whole or not at all.

        Raises:
            InputError: the place cannot be written.
        """
        circuits = [{"name": name, **each.to_dict()} for name, each in self.circuits.items()]
        body = {"circuits": circuits, "why": dict(self.why)}
        return save_artifact(path, body, format=_FORMAT, version=_VERSION)

    @classmethod
    def load(cls, path: str | Path) -> PlantedComparison:
        """Read what `save` wrote.

        Raises:
            InputError: no such file. ArtifactError: damaged, another kind of file, or newer.
        """
        body, _ = load_artifact(path, format=_FORMAT, version=_VERSION)
        try:
            circuits = {each["name"]: Comparison.from_dict(each) for each in body["circuits"]}
            return cls(circuits, body["why"])
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: not a whole comparison ({error})") from error
