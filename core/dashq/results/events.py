"""Events that a run reports to its listener."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dashq.results.judged import Judgement
from dashq.results.report import LayerReport, Totals
from dashq.results.tuned import TuningCheck


@dataclass(frozen=True)
class RunBegun:
    """The model is found, and nothing is read yet but headers. `layers` are all that it has."""

    model: str
    output: str
    blocks: int
    layers: int
    weights: int


@dataclass(frozen=True)
class PhaseBegun:
    """Something begins that can take a while and has no steps to count: `reading text`, `compiling kernels`."""

    what: str


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

    `kept` says where what calibration learns is kept, or taken from; it is empty where the recipe does not ask for it.
    `warnings` are sentences on what of the model will not be in the result.
    """

    blocks: int
    layers: int
    tokens: int
    computed: str
    warnings: tuple[str, ...] = ()
    kept: str = ""


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


@dataclass(frozen=True)
class RunDone:
    """The result is whole, in the folder `output`. `seconds` are those of each phase."""

    output: str
    totals: Totals
    seconds: Mapping[str, float]
    judgement: Judgement | None


Event = RunBegun | PhaseBegun | Measuring | RunStarted | LayerDone | BlockDone | Tuning | RunDone
Listener = Callable[[Event], None]
