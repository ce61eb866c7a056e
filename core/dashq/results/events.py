"""Events that a run reports to its listener."""

from collections.abc import Callable
from dataclasses import dataclass

from dashq.results.report import LayerReport, TuningCheck


@dataclass(frozen=True)
class Measuring:
    """The costs of layers to the model are being measured, before a run or in its place.

    `done` of `steps` steps are done; `what` is now measured, `layers` or `gradients`.
    """

    what: str
    done: int
    steps: int


@dataclass(frozen=True)
class RunStarted:
    """The plan is made and the text is read. `computed` is the device and the type: `on cpu in bfloat16`.

    `warnings` are sentences on what of the model will not be in the result.
    """

    blocks: int
    layers: int
    tokens: int
    computed: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerDone:
    """One layer is quantized; it is on disk when its shard is."""

    report: LayerReport


@dataclass(frozen=True)
class BlockDone:
    """All layers of a block are done, now or in the run that this one resumes."""

    name: str
    index: int


@dataclass(frozen=True)
class Tuning:
    """A tuner has done `check.step` of `steps` steps; the divergence is that of its latest check."""

    check: TuningCheck
    steps: int


Event = Measuring | RunStarted | LayerDone | BlockDone | Tuning
Listener = Callable[[Event], None]
