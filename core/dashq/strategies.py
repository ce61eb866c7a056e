"""The five interfaces that a plugin can implement.

Every strategy is a frozen pydantic model: its fields are its recipe parameters, and `name` is how a
recipe asks for it. Every class is either abstract (here) or final (in a plugin).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float
from pydantic import model_serializer
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dashq.data import Curvature, Diagonal, Grid, Grouping, Layer, Quantized, StoredLayer
from dashq.programs import Contents, Program
from dashq.strict import Strict


class Strategy(Strict, ABC):
    """The part that all five kinds share: a name, and fields that are recipe parameters."""

    name: ClassVar[str]

    @model_serializer(mode="wrap")
    def _name_and_fields(self, fields: Callable[["Strategy"], dict[str, Any]]) -> dict[str, Any]:
        return {"name": self.name, **fields(self)}


class Estimator(Strategy):
    """A fold over calibration batches: start, update for each batch, finish.

    One fold serves all layers that are given the same tensor, and each expert of a mixture has its own. The result may
    not depend on how tokens are cut into batches of multiples of `chunk_tokens`. Methods run without gradients.
    """

    produces: ClassVar[type[Curvature]] = Diagonal

    @property
    def chunk_tokens(self) -> int:
        """Length in tokens of the chunks this estimator compares; 1 where it compares none.

        Batches cut at multiples of it give the same result; with 1, any batches do.
        """
        return 1

    @abstractmethod
    def start(self, layer: Layer) -> Any:
        """The empty state of a layer, before any token.

        Called once for each fold, when the first batch arrives or, where none does, at the end. Only the layer's name
        and shape are known. The state may be any object; its tensors may lie on any device.
        """

    @abstractmethod
    def update(self, state: Any, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]) -> Any:
        """Fold one batch of layer inputs into the state and return it; each token counts `token_weight` times.

        Called once for each batch, in the order of the calibration text. Both tensors are float32 on the layer's
        device, to which the state follows; weights are finite and at least 0, and 1 outside of mixtures. There may be
        no tokens. The inputs stay as they are; the state's storage may be used again.
        """

    @abstractmethod
    def merge(self, state: Any, other: Any) -> Any:
        """The state of both token sets together, so that calibration can be shared among workers.

        Both states are of the same layer and on the same device; either may be empty. Equal to one fold over all
        tokens, up to rounding. A run on one machine never calls it, the contract does.
        """

    @abstractmethod
    def finish(self, state: Any) -> Curvature:
        """The curvature that the state amounts to, an instance of `produces`.

        Called once, after the last batch. An empty state is possible, of a layer that no token reached: its curvature
        is finite and all 0. Inputs that are not finite may show in the diagonal, which the run then refuses.
        """


class Grouper(Strategy):
    """Decides which columns share a scale. One that gives the columns another order says so with `reorders`."""

    reorders: ClassVar[bool] = False

    @abstractmethod
    def size_for(self, columns: int) -> int:
        """Columns per group in a layer of `columns` inputs.

        Called for each layer while the plan is made, before a weight is read. Raises a `PlanError` that says which
        sizes are possible where the recipe's is not.
        """

    @abstractmethod
    def group(self, weight: Float[Tensor, "rows columns"], curvature: Curvature) -> Grouping:
        """Cut the columns into groups of `size_for(columns)`.

        Called once for each layer, before the solver, with the float32 weight on the layer's device; both inputs stay
        as they are. The same input gives the same groups. A layer that no token reached has a diagonal of zeros.
        """


class Solver(Strategy):
    """Chooses codes, scales and offsets: a pure function of tensors.

    `needs` is the least curvature that it works with; plans refuse estimators that produce less. It
    `supports_super_blocks` where it works on grids of super-blocks; others are never given one.

    Its `objective` is what it lowers, and never above min-max rounding: of the weighted error Σ h (w - ŵ)², with h the
    diagonal of the curvature, that of each of the `groups` (on super-blocks, of each row); or of whole `rows`, (w - ŵ)ᵀ
    H (w - ŵ) with all of H. Certificates compare solvers of groups with the optimum.
    """

    needs: ClassVar[type[Curvature]] = Curvature
    objective: ClassVar[Literal["groups", "rows"]] = "groups"
    supports_super_blocks: ClassVar[bool] = False

    def check(self, size: int, grid: Grid) -> None:
        """Refuse what this solver cannot do, before a weight is read; accepts everything unless overridden.

        Called for each layer while the plan is made. Raises a `PlanError` that says what is possible where it cannot
        take groups of `size` on `grid`.
        """

    @abstractmethod
    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        """Quantize a weight inside `grid`, with scale and offset already in the grid's types.

        Called once for each layer, without gradients; analyses call it once for each choice, with some of the rows.
        Weight and curvature are float32 on the layer's device, where the result lies as well, and stay as they are. The
        same input gives the same output. A group whose columns saw no input has no importance: it is solved as if all
        its columns counted alike, and the run reports it.
        """


class Router(Strategy):
    """Decides how much each calibration token counts for each expert."""

    @abstractmethod
    def token_weights(
        self, probabilities: Float[Tensor, "tokens experts"], chosen: Bool[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        """The weight of each token for each expert: finite and at least 0; an expert is not shown tokens of weight 0.

        Called once for each batch of each mixture, on the model's device. `probabilities` are what the model's own gate
        gives all experts, `chosen` those that it sends the token to. Both stay as they are.
        """


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
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Sequence[StoredLayer]
    ) -> None:
        """Raise a `PlanError` where the format cannot hold such a model with these layers quantized.

        Of `network` only names, shapes and the configuration count: its weights may not be there.
        """

    def describe(
        self, layers: Sequence[StoredLayer], others: Sequence[str], config: PretrainedConfig
    ) -> Mapping[str, Mapping[str, Any]] | None:
        """Entries for JSON files beside the tensors, by the files' names; those of `config.json` go into the model's.

        `others` are the model's linear layers that are not quantized. None: only dashq opens the result.
        """
        return None

    @classmethod
    def recognise(cls, folder: Path) -> Sequence[StoredLayer]:
        """The quantized layers of a checkpoint that another program wrote in this format; none where it is no such."""
        return ()

    def file(self, config: PretrainedConfig) -> str | None:
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
