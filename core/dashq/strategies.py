"""The six interfaces that a plugin can implement.

Every strategy is a frozen pydantic model: its fields are its recipe parameters, and `name` is how a
recipe asks for it. Every class is either abstract (here) or final (in a plugin).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field, PositiveInt, model_serializer
from torch import Tensor

from dashq.curvature import Coupled, Curvature, Diagonal
from dashq.data import Contents, Grid, Grouping, Layer, Quantized, StoredLayer, Tunable
from dashq.errors import PlanError
from dashq.strict import Strict
from dashq.text_source import Sources

if TYPE_CHECKING:
    import transformers


Claim = Literal["never_worse_than_minmax"]


class Strategy(Strict, ABC):
    """The part that all six kinds share: a name, and fields that are recipe parameters."""

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

    def state_size(self, columns: int) -> int:
        """About how many numbers of four bytes the state of a layer with `columns` inputs holds.

        Plans estimate memory by it, and time: each token is taken to change each number once. Unless overridden, a
        matrix of the columns for a `Coupled` curvature, else one number for each column.
        """
        return columns**2 if issubclass(self.produces, Coupled) else columns

    @abstractmethod
    def start(self, layer: Layer) -> Any:
        """The empty state of a layer, before any token.

        Called once for each fold, before its first batch, and also where no batch follows. Only the layer's name and
        shape are known. The state is a tree that can be sent to other processes: tensors, numbers, texts and None, in
        lists, tuples, dicts with texts for keys, and dataclasses. Its tensors may lie on any device.
        """

    @abstractmethod
    def update(self, state: Any, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]) -> Any:
        """Fold one batch of layer inputs into the state and return it; each token counts `token_weight` times.

        Called once for each batch, in the order of the calibration text. Both tensors are float32 on the layer's
        device, to which the state follows; weights are finite and at least 0, and 1 outside of mixtures. There may be
        no tokens. The inputs are not changed; the state's storage may be used again.
        """

    @abstractmethod
    def merge(self, state: Any, other: Any) -> Any:
        """The state of both token sets together, so that calibration can be shared among processes.

        Called once for each share of the samples but the first, in their order, also where one process has them all.
        Both states are of the same layer and on the same device; either may be empty. Neither is used again. Equal to
        one fold over all tokens, up to rounding.
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

        Called before the solver, with the float32 weight on the layer's device: once for each layer, in analyses once
        for each choice. The inputs are not changed; the same input gives the same groups. A layer that no token
        reached has a diagonal of zeros.
        """


class Solver(Strategy):
    """Chooses codes, scales and offsets: a pure function of tensors.

    `needs` is the least curvature that it works with; plans refuse estimators that produce less. It
    `supports_super_blocks` and `supports_codebooks` where it works on grids that have them; others are never given one.

    Its `objective` is what it lowers: of the weighted error Σ h (w - ŵ)², with h the diagonal of the curvature, that of
    each of the `groups` (on super-blocks, of each row); or of whole `rows`, (w - ŵ)ᵀ H (w - ŵ) with all of H.
    Certificates compare solvers of groups with the optimum.

    Its `claims` are laws that it keeps besides those of every solver, and that the contract then holds it to.
    `never_worse_than_minmax`: its objective is never above that of min-max rounding. A solver that rounds at random, or
    that lowers something else, claims nothing.
    """

    needs: ClassVar[type[Curvature]] = Curvature
    objective: ClassVar[Literal["groups", "rows"]] = "groups"
    claims: ClassVar[Sequence[Claim]] = ()
    supports_super_blocks: ClassVar[bool] = False
    supports_codebooks: ClassVar[bool] = False

    def check(self, size: int, grid: Grid) -> None:
        """Refuse what this solver cannot do, before a weight is read; accepts everything unless overridden.

        Called for each layer while the plan is made. Raises a `PlanError` that says what is possible where it cannot
        take groups of `size` on `grid`.
        """

    def nanoseconds(self, layer: Layer, size: int, grid: Grid) -> float:
        """About how long one weight of a layer takes on one core of a server's CPU, in groups of `size` on `grid`.

        Plans estimate the time of a run by it. Unless overridden, that of compiled arithmetic with some hundred
        operations for each weight.
        """
        return 50.0

    @abstractmethod
    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        """Quantize a weight inside `grid`, with scale and offset already in the grid's types.

        Called once for each layer, without gradients; analyses call it once for each choice, with some of the rows.
        Weight and curvature are float32 on the layer's device, where the result lies as well, and are not changed. The
        same input gives the same output. A group whose columns saw no input has no importance: it is solved as if all
        its columns counted alike, and the run reports it.
        """

    def prepared(
        self, curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Callable[[Float[Tensor, "rows columns"]], Quantized]:
        """A function that solves some rows of a layer as `solve` does, after what all rows have in common.

        Rows are solved in strips, which several processes may share, and may not depend on one another. One function
        serves successive layers with the same curvature, such as q, k and v; rows of small ones may come in one call.
        Unless overridden, nothing is prepared.
        """
        return lambda weight: self.solve(weight, curvature, grouping, grid)


class Router(Strategy):
    """Decides how much each calibration token counts for each expert."""

    @abstractmethod
    def token_weights(
        self, probabilities: Float[Tensor, "tokens experts"], chosen: Bool[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        """The weight of each token for each expert: finite and at least 0; an expert is not shown tokens of weight 0.

        Called once for each batch of each mixture, on the model's device. `probabilities` are what the model's own gate
        gives all experts, `chosen` those that it sends the token to. Neither is changed.
        """


class Serializer(Strategy):
    """A codec: turns a quantized layer into tensors and back. Writing files is the core's job.

    The law: `unpack(pack(q))` holds the same codes, scales and offsets as `q`, bit by bit. Where the format's runtimes
    fuse neighbouring layers, such as q, k and v (`runtimes_fuse_layers`), plans warn of those that are not quantized
    alike, and a budget decides about them together; so it does about the experts of one stack where the format has one
    type for all of them (`stacks_experts`). Where they cannot read a mixture's quantized experts (not `holds_experts`),
    packed embeddings or a packed head, plans refuse these. `files` are the names of all files that a result can hold
    besides `config.json` and shards of safetensors: those of `describe` and of the `container`. They go when a result
    is replaced. Model cards name the `library` that the hub lists results under, and show `openings`: by the name of a
    program, Python code that opens a result there, or a shell command behind `$ `, with `{model}` in the place of its
    folder or its name on the hub. Of models that take images or sounds too, and are of the types in `text_alone`, a
    result is the text model; plans and cards show the sentence there, which says where programs take the rest from.
    """

    runtimes_fuse_layers: ClassVar[bool] = False
    holds_experts: ClassVar[bool] = True
    stacks_experts: ClassVar[bool] = False
    holds_embeddings: ClassVar[bool] = False
    holds_head: ClassVar[bool] = False
    files: ClassVar[Sequence[str]] = ()
    library: ClassVar[str] = "transformers"
    openings: ClassVar[Mapping[str, str]] = {}
    text_alone: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def grid(self, bits: int) -> Grid:
        """The values this format can hold in codes of `bits` bits.

        Called while planning and whenever a result is opened, many times for the same bits. Raises a `PlanError` that
        says which bits are possible.
        """

    def types(self, bits: int) -> Mapping[str, Grid]:
        """The grids of `bits` bits by the names that recipes ask for them by, where the format has several.

        Called like `grid`. Empty where there is none but `grid(bits)`; else no two are equal, and that is among them.
        """
        return {}

    def grid_of(self, bits: int, name: str | None) -> Grid:
        """The grid of a type of that name, or the usual one of these bits; a `PlanError` that says which there are."""
        if name is None:
            return self.grid(bits)
        if name not in (types := self.types(bits)):
            possible = f"possible are {', '.join(types)}" if types else "it has one alone there, without a name"
            raise PlanError(f"format {self.name} has no type {name!r} at {bits} bits: {possible}")
        return types[name]

    def name_of(self, grid: Grid) -> str | None:
        """The name of the type that has this grid; None for the usual one of its bits."""
        if grid == self.grid(grid.bits):
            return None
        return next((name for name, other in self.types(grid.bits).items() if other == grid), None)

    @abstractmethod
    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        """The layer's tensors by the last part of their names, on the device of `quantized`.

        Called right after a layer is solved; the walk copies the tensors to the CPU and writes them. Also called on
        the meta device, where tensors have no values, by plans and wherever a result is opened, for names, shapes and
        types: these may depend on the shapes, types and grid of `quantized` alone. Raises a `PlanError` where the
        format cannot hold the layer, on the meta device already.
        """

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Shaped[Tensor, "..."]], columns: int, size: int, grid: Grid) -> Quantized:
        """The layer that `tensors` hold, with `columns` inputs in groups of `size`, on the tensors' device.

        Called when a result is opened, compared or converted, when a run is resumed, and in every forward pass of an
        opened result. The tensors have the names, shapes and types that `pack` gives; a `ValueError` says what is
        wrong with their values.
        """

    def rows(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], index: Int[Tensor, " rows"]
    ) -> Mapping[str, Shaped[Tensor, "..."]]:
        """The tensors of a layer that has only these rows of another one, in this order; for `unpack`.

        Called for every lookup of tokens in packed embeddings, where the format `holds_embeddings`. Unless overridden,
        each tensor has the layer's rows along its first axis.
        """
        return {name: tensor[index] for name, tensor in tensors.items()}

    def check(self, layers: Sequence[StoredLayer]) -> None:
        """Raise a `PlanError` that names a layer where these cannot lie in one checkpoint.

        Called for every plan and conversion, possibly more than once, with all layers that are to be quantized, at
        least one.
        """

    def check_model(
        self,
        network: "transformers.PreTrainedModel",
        tokenizer: "transformers.PreTrainedTokenizerBase",
        layers: Sequence[StoredLayer],
        source: Path | None,
    ) -> None:
        """Raise a `PlanError` where the format cannot hold the model with these layers quantized.

        Called after `check` for every run and conversion. Only the names, shapes and configuration of `network` count:
        its weights lie on the meta device. `source` is the one file that the model is read from, such as one of GGUF;
        None where it is read from safetensors.
        """

    def describe(
        self, layers: Sequence[StoredLayer], unquantized: Sequence[str], config: "transformers.PretrainedConfig"
    ) -> Mapping[str, Mapping[str, Any]] | None:
        """Entries for JSON files beside the tensors, by the files' names; those of `config.json` go into the model's.

        Called once at the end of a run, and by `dashq verify`, which compares. `unquantized` are the names of the
        model's other linear layers. None: only dashq opens the result, and its own settings go into `config.json`.
        """
        return None

    @classmethod
    def recognise(cls, folder: Path) -> Sequence[StoredLayer]:
        """The quantized layers of a checkpoint that another program wrote in this format; empty for any other folder.

        Called for folders that dashq did not write. Raises a `CheckpointError` where the folder is of this format and
        broken.
        """
        return ()

    def container(self, config: "transformers.PretrainedConfig") -> "Container | None":
        """The one file that a model of this configuration is put together in, where the format's programs want that.

        Called at the end of a run and when a result is opened. None: the tensors lie in shards, as `pack` names them.
        """
        return None


class Container(ABC):
    """The one file that a format has in the place of shards; its tensors can have other names and layouts.

    `file` is its name in the result's folder.
    """

    file: ClassVar[str]

    @abstractmethod
    def write(self, path: Path, contents: Contents) -> None:
        """Write the file to `path`, a temporary name, from handles that read a tensor when indexed with `[...]`.

        Called once at the end of a run, when everything else lies in `contents.folder`. No more than a few tensors
        should be in memory together.
        """

    def beside(self, contents: Contents) -> Mapping[str, str]:
        """Texts of files beside it, by names that stand among the serializer's `files` as well.

        Called once after `write`, with the same `contents`.
        """
        return {}

    @abstractmethod
    def read(self, path: Path, contents: Contents) -> Mapping[str, Any]:
        """Handles of the file's tensors under the names that shards would have, read when indexed with `[...]`.

        `contents` has no tensors here. Raises a `CheckpointError` where the file is broken. A tensor that is missing
        is left out: the core says so.
        """

    def settings(self, path: Path, contents: Contents) -> Mapping[str, tuple[Any, Any]]:
        """Settings inside the file by name, each as it has to be and as it is (None: missing), for `dashq verify`.

        `contents` has no tensors here. Those that follow from other files of the folder are meant.
        """
        return {}


class Tuner(Strategy):
    """Lets scales, offsets and norms of the quantized model learn from the original one, once all blocks are solved.

    The plugin says which numbers change and by which steps, and what the loss is; codes, grids, text, gradients and
    files are the engine's. Gradients are those of the model as its file will hold it. The text is `samples` pieces of
    `sequence_length` tokens from `dataset`, that of the calibration unless given, and never a piece that calibration
    saw; it is gone through `epochs` times, `batch` samples for each step. Of all states the one that predicts held-out
    pieces most like the original model is kept, which may be the first.
    """

    dataset: Sources | None = None
    samples: PositiveInt = 120
    sequence_length: PositiveInt = 512
    epochs: PositiveInt = 1
    batch: PositiveInt = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0  # as torch takes them

    @property
    def steps(self) -> int:
        """The number of steps."""
        return -(-self.samples // self.batch) * self.epochs

    @abstractmethod
    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        """The optimizer of the changes to be made: those of the `tunables` whose parameters it is given.

        Called once before the first step, on the model's device, where all parameters are 0; also while planning, on
        the meta device. At least one is to be changed. Its state, tensors and numbers, is saved with the parameters.
        """

    @abstractmethod
    def loss(
        self,
        original: Float[Tensor, "tokens words"],
        quantized: Float[Tensor, "tokens words"],
        next_tokens: Int[Tensor, " tokens"],
    ) -> Float[Tensor, ""]:
        """The loss of some tokens, to be summed over all: from both models' logits in float32, and what follows them.

        Called with gradients, for pieces of a sample after the other. The engine divides by the number of tokens.
        """

    def step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Change the parameters by their gradients, which are those of the mean loss; the engine clears them.

        Called once for each step; `progress` is the share of the steps that are done before it. Parameters that
        nothing depended on, as of an expert without tokens, have no gradient.
        """
        optimizer.step()


KINDS: Mapping[str, type[Strategy]] = {
    "estimators": Estimator,
    "solvers": Solver,
    "groupers": Grouper,
    "routers": Router,
    "serializers": Serializer,
    "tuners": Tuner,
}
