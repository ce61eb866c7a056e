"""The five interfaces that a plugin can implement.

Every strategy is a frozen pydantic model: its fields are its recipe parameters, and `name` is how a
recipe asks for it. Every class is either abstract (here) or final (in a plugin).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Bool, Float
from pydantic import model_serializer
from torch import Tensor

from dashq.data import Curvature, Diagonal, Grid, Grouping, Layer, Quantized, StoredLayer
from dashq.programs import Contents, Program
from dashq.strict import Strict

if TYPE_CHECKING:
    import transformers


class Strategy(Strict, ABC):
    """What all five kinds share: a name, and fields that are recipe parameters."""

    name: ClassVar[str]

    @model_serializer(mode="wrap")
    def _name_and_fields(self, fields: Callable[["Strategy"], dict[str, Any]]) -> dict[str, Any]:
        return {"name": self.name, **fields(self)}


class Estimator(Strategy):
    """A fold over calibration batches: start, update for each batch, finish.

    The result may not depend on how tokens are cut into batches of multiples of `chunk_tokens`.
    """

    produces: ClassVar[type[Curvature]] = Diagonal

    @property
    def chunk_tokens(self) -> int:
        """How many successive tokens belong together."""
        return 1

    @abstractmethod
    def start(self, layer: Layer) -> Any:
        """The state before any token was seen."""

    @abstractmethod
    def update(self, state: Any, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]) -> Any:
        """Fold one batch of float32 layer inputs into the state; each token counts `token_weight` times.

        May reuse the state's storage. The state follows the device of `x`.
        """

    @abstractmethod
    def merge(self, state: Any, other: Any) -> Any:
        """The state of both token sets together, so that calibration can be shared among workers."""

    @abstractmethod
    def finish(self, state: Any) -> Curvature:
        """What was learned."""


class Grouper(Strategy):
    """Decides which columns share a scale. One that gives the columns another order says so with `reorders`."""

    reorders: ClassVar[bool] = False

    @abstractmethod
    def size_for(self, columns: int) -> int:
        """Columns per group in a layer of `columns` inputs; a `PlanError` where the recipe's size cannot be."""

    @abstractmethod
    def group(self, weight: Float[Tensor, "rows columns"], curvature: Curvature) -> Grouping:
        """Cut the columns into groups of `size_for(columns)`."""


class Solver(Strategy):
    """Chooses codes, scales and offsets: a pure function of tensors.

    It `supports_super_blocks` where it works on grids of super-blocks; others are never given one.
    """

    needs: ClassVar[type[Curvature]] = Curvature
    supports_super_blocks: ClassVar[bool] = False

    def check(self, size: int, grid: Grid) -> None:
        """Raise a `PlanError` that says what is possible where this solver cannot take groups of `size` on `grid`."""

    @abstractmethod
    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        """Quantize a float32 weight inside `grid`, with scale and offset already in `grid.dtype`.

        The same input gives the same output, never worse than min-max rounding in the weighted error.
        """


class Router(Strategy):
    """Decides how much each calibration token counts for each expert."""

    @abstractmethod
    def token_weights(
        self, probabilities: Float[Tensor, "tokens experts"], chosen: Bool[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        """Weights of at least zero, from the model's own gate."""


class Serializer(Strategy):
    """Turns a quantized layer into tensors and back. Writing files is the core's job.

    The law: `unpack(pack(q))` holds the same codes, scales and offsets as `q`, bit by bit. `programs` open the files
    without dashq, by the name that `dashq verify --with` takes; where they `fuse` neighbouring layers, such as q, k
    and v, those should be quantized alike. Where they cannot read quantized `experts` of a mixture, plans refuse them.
    """

    programs: ClassVar[Mapping[str, Program]] = {}
    runtimes_fuse_layers: ClassVar[bool] = False
    holds_experts: ClassVar[bool] = True

    @abstractmethod
    def grid(self, bits: int) -> Grid:
        """The values this format can hold, or a `PlanError` that says which bits it can."""

    @abstractmethod
    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        """The layer's tensors by the last part of their names. Shapes and types depend on shapes and types only.

        Plans try it on the meta device: a `PlanError` there says that the format cannot hold such a layer.
        """

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], columns: int, size: int, grid: Grid) -> Quantized:
        """The layer that `tensors` hold, with `columns` inputs in groups of `size`."""

    def check(self, layers: Sequence[StoredLayer]) -> None:
        """Raise a `PlanError` that names a layer where these cannot lie in one checkpoint."""

    def check_model(
        self,
        network: "transformers.PreTrainedModel",
        tokenizer: "transformers.PreTrainedTokenizerBase",
        layers: Sequence[StoredLayer],
    ) -> None:
        """Raise a `PlanError` where the format cannot hold such a model with these layers quantized.

        Of `network` only names, shapes and the configuration count: its weights may not be there.
        """

    def describe(
        self, layers: Sequence[StoredLayer], others: Sequence[str], config: "transformers.PretrainedConfig"
    ) -> Mapping[str, Mapping[str, Any]] | None:
        """Entries for JSON files beside the tensors, by the files' names; those of `config.json` go into the model's.

        `others` are the model's linear layers that are not quantized. None: only dashq opens the result.
        """
        return None

    @classmethod
    def recognise(cls, folder: Path) -> Sequence[StoredLayer]:
        """The quantized layers of a checkpoint that another program wrote in this format; none where it is no such."""
        return ()

    def file(self, config: "transformers.PretrainedConfig") -> str | None:
        """The name of the one file that such a model is put together in, where the format's programs want that.

        None: the tensors lie in shards, as `pack` names them.
        """
        return None

    def write(self, path: Path, contents: Contents) -> None:
        """Write the one `file`, from tensors that are read when they are asked for; formats of shards have none."""
        raise NotImplementedError(f"{self.name} has no file of its own")

    def read(self, path: Path, contents: Contents) -> Mapping[str, Any]:
        """Handles of the one `file`'s tensors by the names of `contents`, read when they are indexed with `[...]`."""
        raise NotImplementedError(f"{self.name} has no file of its own")


KINDS: Mapping[str, type[Strategy]] = {
    "estimators": Estimator,
    "solvers": Solver,
    "groupers": Grouper,
    "routers": Router,
    "serializers": Serializer,
}
