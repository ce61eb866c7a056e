"""The sums that a part of the model leaves when all samples have passed it, fold by fold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import or_

from dashq.calibration.folds import FoldSums


@dataclass(frozen=True, eq=False)
class PartSums:
    """All that calibration learned of the planned layers of a block, or of the head: a tree without a curvature in it.

    A fold goes by the name of the layer that it was begun for. `inputs` has the fold of each layer outside of mixtures,
    `folds` those of experts besides; `pooled` has the pooled fold of each expert's layer, one of the `pooled_folds`.
    `chosen` are the tokens that the model sent to each expert, by the name of the mixture.
    """

    folds: Mapping[str, FoldSums] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    pooled_folds: Mapping[str, FoldSums] = field(default_factory=dict)
    pooled: Mapping[str, str] = field(default_factory=dict)
    chosen: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @staticmethod
    def together(parts: Sequence["PartSums"]) -> "PartSums":
        """The sums of layers that were watched apart, such as those of several mixtures in one block."""
        names = [entry.name for entry in fields(PartSums)]
        return PartSums(**{name: reduce(or_, (vars(part)[name] for part in parts)) for name in names})
