"""Open a decoder without reading it: layers from its headers, blocks one at a time."""

from collections import defaultdict
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel, PreTrainedTokenizerBase

from dashq.data import Layer
from dashq.device import give_back_memory, type_name
from dashq.errors import CheckpointError, one_line, refusing
from dashq.model.files import FLOATS, open_files, untie, warn_of_adapter
from dashq.model.float8 import WAY_OUT
from dashq.model.loading import check_shape, read_tokenizer
from dashq.model.location import Location
from dashq.model.mixtures import BlockExperts, Matrix, linear_modules
from dashq.model.outside import outside_layers
from dashq.model.progress_bars import without_progress_bars
from dashq.model.source import Header
from dashq.model.transformers_internals import Destination, WeightConverter, destinations, fill, tied_weights
from dashq.model.unread import clear_predicting_layers, unread_tensors, warn_of_unread

OUTSIDE = ""  # the part of a model that belongs to no block: embeddings, last norm, head


@dataclass(frozen=True, eq=False)
class Block:
    """Decoder block `index` in memory: the module to run, and its tensors by full name as the checkpoint holds them.

    When the walk has left it, its tensors are gone and its parameters are empty.
    """

    index: int
    name: str
    module: nn.Module
    tensors: Mapping[str, Tensor]
    device: torch.device

    @property
    def linears(self) -> Mapping[str, nn.Module]:
        """The block's linear layers by full name."""
        return {f"{self.name}.{name}": module for name, module in linear_modules(self.module)}

    def weight(self, name: str) -> Float[Tensor, "rows columns"]:
        """One layer's weight as the checkpoint holds it."""
        matrix = self._matrices[name]
        return matrix.of(self.tensors[f"{self.name}.{matrix.parameter}"])

    def replace_weight(self, name: str, weight: Float[Tensor, "rows columns"]) -> None:
        """Let one layer compute with another weight."""
        matrix = self._matrices[name]
        matrix.of(self.module.get_parameter(matrix.parameter).data).copy_(weight)

    def tensors_without(self, names: Collection[str]) -> dict[str, Tensor]:
        """All tensors but the weights of these layers; a stack that loses only some leaves the others singly."""
        parameters = {f"{self.name}.{self._matrices[name].parameter}" for name in names}
        rest = {name: tensor for name, tensor in self.tensors.items() if name not in parameters}
        for name, matrix in self._matrices.items():
            if matrix.index is not None and name not in names and f"{self.name}.{matrix.parameter}" in parameters:
                rest[f"{name}.weight"] = self.weight(name)
        return rest

    @cached_property
    def _matrices(self) -> Mapping[str, Matrix]:
        return {f"{self.name}.{name}": matrix for name, matrix in block_matrices(self.module).items()}


class Model:
    """A decoder whose weights stay in their files until they are asked for.

    `network` is the transformers model, its parameters on the meta device; `blocks` names its decoder blocks
    in order. Only `walk`, `block` and `outside` read weights. `warnings` are sentences on what of the files is no
    part of the network. Of models of the types in `text_alone` it is the text model, as `Serializer` has them.
    """

    def __init__(
        self, location: Location, device: torch.device, dtype: torch.dtype, text_alone: Mapping[str, str] = {}
    ) -> None:
        self.location, self.device, self.dtype = location, device, dtype
        self.source, self.network = open_files(location, text_alone)
        self.blocks = _find_blocks(location, self.network)
        self._refuse_shared_blocks()
        self._conversions = self.source.conversions(self.network)
        headers = self.source.headers()
        places = destinations(headers, self.network, self._conversions)
        if untied := self._untied(places):
            # As transformers does: what the files hold counts more than what the configuration says.
            self.network = untie(location, self.network)
            if remaining := untied & tied_weights(self.network).keys():
                raise CheckpointError(f"{location} holds {min(remaining)} with values that its configuration ties away")
        unread = self._unread(places)
        cleared = clear_predicting_layers(self.network.config, unread)
        self.warnings = (*self.source.notes, *warn_of_adapter(location), *warn_of_unread(unread), *cleared)
        self._keys = self._match_keys(headers, places)
        # Computing may be in another type, but a part that is read again is read in the type that the files have.
        self._dtypes = {
            (module, name): parameter.dtype
            for module in self.network.modules()
            for name, parameter in module.named_parameters(recurse=False)
        }

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the weights; a `CheckpointError` where there is none that can be read."""
        return read_tokenizer(self.location)

    def layers(self) -> tuple[Layer, ...]:
        """Every weight matrix of every block but those of gates: linear layers first, then the experts of mixtures."""
        layers = []
        for block in self.blocks:
            module = self._part(block)
            for name, matrix in block_matrices(module).items():
                rows, columns = matrix.of(module.get_parameter(matrix.parameter)).shape
                layers.append(Layer(name=f"{block}.{name}", rows=rows, columns=columns, expert=matrix.expert))
        return tuple(layers)

    def all_layers(self) -> tuple[Layer, ...]:
        """The layers of all blocks, then embeddings and head, or the one matrix that is both."""
        return (*self.layers(), *outside_layers(self.network))

    def unclear_weights(self) -> Mapping[str, str]:
        """Weights inside blocks that look like experts and are not understood, by name, each with the reason."""
        return {
            f"{block}.{name}": reason
            for block in self.blocks
            for name, reason in BlockExperts(self._part(block)).not_understood.items()
        }

    def walk(self, backwards: bool = False) -> Iterator[Block]:
        """Every decoder block in order, each in memory until the next one is asked for."""
        indices = range(len(self.blocks))
        for index in reversed(indices) if backwards else indices:
            give_back_memory()
            with self.block(index) as block:
                yield block

    @contextmanager
    def block(self, index: int) -> Generator[Block]:
        """Decoder block `index` in memory, for the duration of the `with` statement."""
        name = self.blocks[index]
        module = self._part(name)
        tensors: dict[str, Tensor] = {}
        try:
            tensors |= self._read(name)
            self._move(name)
            yield Block(index, name, module, tensors, self.device)
        finally:
            tensors.clear()  # whoever still refers to the block would keep its files in memory beside the next one's
            self._empty(module)

    @contextmanager
    def outside(self, head: bool = False) -> Generator[Mapping[str, Tensor]]:
        """Everything outside the blocks: its tensors as the checkpoint holds them, and the network ready to embed.

        With the `head` it can predict as well.
        """
        tensors: dict[str, Tensor] = {}
        try:
            tensors |= self._read(OUTSIDE)
            if head:
                self.network.tie_weights()  # what was emptied before is tied no more
            elif (unused := self.network.get_output_embeddings()) is not None:
                self._empty(unused)  # written as it is, and not needed to calibrate
            self._move(OUTSIDE)
            yield tensors
        finally:
            tensors.clear()
            self._empty(self.network)

    def _part(self, name: str) -> nn.Module:
        return self.network.get_submodule(name)

    @without_progress_bars()
    def _read(self, part: str) -> dict[str, Tensor]:
        """Fill a part of the network, and return what was read by full name, in the checkpoint's types."""
        with refusing(f"{self.location}: {part or 'the part outside the blocks'} cannot be read"):
            tensors = self.source.lazy(self._keys[part])
            errors = fill(self.network, dict(self._state(part)), tensors, self._conversions)
        if errors:
            raise CheckpointError(f"{self.location}: {one_line(errors[0])}")
        tensors = {name: tensor.detach() for name, tensor in self._state(part)}
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise CheckpointError(f"{self.location} lacks the tensor {name}")
            # By the extremes, which need no memory beside the tensor.
            if tensor.is_floating_point() and tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
                raise CheckpointError(f"{self.location}: the tensor {name} holds NaN or infinite values")
        return tensors

    def _state(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """Parameters and saved buffers of one part; tied copies and, outside, the blocks are left out."""
        tied = tied_weights(self.network)
        state = self._part(part).state_dict(prefix=f"{part}." if part else "", keep_vars=True)
        for name, tensor in state.items():
            if part != OUTSIDE or not (self._part_of(name) or name in tied):
                yield name, tensor

    def _move(self, part: str) -> None:
        """Send what was read to the computing device and type; buffers keep theirs (rotary tables want float32)."""
        for _, tensor in self._state(part):
            if isinstance(tensor, nn.Parameter) and not tensor.is_meta:
                tensor.data = tensor.data.to(self.device, self.dtype if tensor.is_floating_point() else None)
        for buffer in self._part(part).buffers():
            buffer.data = buffer.data.to(self.device)

    def _empty(self, part: nn.Module) -> None:
        """Give up the parameters' memory."""
        for module in part.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty_like(parameter, device="meta", dtype=self._dtypes[module, name])
                setattr(module, name, nn.Parameter(empty, requires_grad=False))

    def _untied(self, places: Mapping[str, Destination]) -> set[str]:
        """The tied parameters that have values of their own in the files; `places` are those of `destinations`.

        The only place where opening reads weights: where the files hold both, which few do, it takes both to know.
        """
        keys = {place.parameter: key for key, place in places.items() if not place.converted}
        untied = set()
        for name, other in tied_weights(self.network).items():
            if name in keys and other in keys:
                tensors = self.source.lazy([keys[name], keys[other]])
                values, other_values = tensors[keys[name]][...], tensors[keys[other]][...]
                if values.dtype != other_values.dtype or not values.equal(other_values):
                    untied.add(name)
        return untied

    def _unread(self, places: Mapping[str, Destination]) -> tuple[str, ...]:
        """The files' tensors that no module reads; `places` are those of `destinations`."""
        buffers = {name for name, _ in self.network.named_buffers()}  # also those that are saved nowhere
        parameters = self.network.state_dict().keys() | buffers
        return unread_tensors(str(self.location), {key: place.parameter for key, place in places.items()}, parameters)

    def _match_keys(self, headers: Mapping[str, Header], places: Mapping[str, Destination]) -> Mapping[str, list[str]]:
        """The files' tensor names by part of the model; shapes are compared before anything is read."""
        expected, tied = self.network.state_dict(keep_vars=True), tied_weights(self.network).keys()
        keys: dict[str, list[str]] = defaultdict(list)
        missing = expected.keys() - tied
        for key, destination in places.items():
            name = destination.parameter
            if name not in expected or name in tied:
                continue
            header = headers[key]
            missing.discard(name)
            keys[self._part_of(name)].append(key)
            place = f"{self.location}: tensor {key}"
            if expected[name].is_floating_point() and header.dtype not in (None, *FLOATS):
                raise CheckpointError(
                    f"{place} is of type {type_name(header.dtype)}, without a scale that is known, "
                    f"where the model needs weights in float16, bfloat16, float32 or float64: {WAY_OUT}"
                )
            if not destination.converted:
                check_shape(place, header.shape, tuple(expected[name].shape))
                if header.dtype is not None and header.dtype != expected[name].dtype:
                    expected[name].data = expected[name].data.to(header.dtype)
        # A converter may make a parameter of tensors with other names; what it then lacks is noticed when it is read.
        head = {name for name, module in self.network.named_modules() if module is self.network.get_output_embeddings()}
        if missing and missing == {f"{name}.weight" for name in head}:
            raise CheckpointError(
                f"{self.location} holds no head that predicts tokens ({min(missing)}), as models of embeddings do. To "
                "quantize it all the same, write `tie_word_embeddings: true` into its config.json: calibration needs "
                "no head, and the result opens with AutoModel"
            )
        if missing and not any(isinstance(entry, WeightConverter) for entry in self._conversions):
            raise CheckpointError(f"{self.location} lacks {len(missing)} tensors, the first is {min(missing)}")
        return keys

    def _refuse_shared_blocks(self) -> None:
        """Blocks are read and quantized alone, which those that share weights cannot be."""
        for name, other in tied_weights(self.network).items():
            if self._part_of(name) != OUTSIDE:
                raise CheckpointError(
                    f"{self.location}: {name} is the same weight as {other}: "
                    "blocks that share weights are not supported"
                )

    def _part_of(self, name: str) -> str:
        blocks = self.blocks[0].rpartition(".")[0]  # of which every item is a block
        if not name.startswith(f"{blocks}."):
            return OUTSIDE
        return f"{blocks}.{name.removeprefix(f'{blocks}.').partition('.')[0]}"


def block_matrices(block: nn.Module) -> Mapping[str, Matrix]:
    """The place of every layer's weight in a block, by layer name inside the block."""
    experts = BlockExperts(block)
    matrices = {name: matrix for mixture in experts.mixtures for name, matrix in mixture.matrices.items()}
    apart = experts.gates | experts.not_understood.keys() | matrices.keys()
    linears = {
        name: Matrix(f"{name}.weight", isinstance(module, Conv1D))
        for name, module in linear_modules(block)
        # Experts for all tokens have no weights in a mixture without them.
        if name not in apart and module.get_parameter("weight").numel()
    }
    return linears | matrices


def linear_weight(module: nn.Module, weight: Float[Tensor, "..."]) -> Float[Tensor, "rows columns"]:
    """A linear layer's weight as [outputs, inputs]; the Conv1D of GPT-2 stores it the other way round."""
    return weight.T if isinstance(module, Conv1D) else weight


def _find_blocks(location: Location, network: PreTrainedModel) -> tuple[str, ...]:
    """The names of the decoder blocks: of the decoder's outermost module lists, the one with most of the parameters.

    Lists inside another list are left out: their names hold a number already, and `Layer.block` ends with the first
    number of a name. So are those of a vision tower, which can be larger than the decoder.
    """
    decoder = set(network.get_decoder().modules())
    lists = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and module in decoder
        if not any(part.isdecimal() for part in name.split("."))
    }
    sizes = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in lists.items()}
    if not sizes or max(sizes.values()) == 0:
        raise CheckpointError(
            f"{location}: {type(network).__name__} has no decoder blocks, or not in a module list: not supported"
        )
    name = max(sizes, key=sizes.__getitem__)
    return tuple(f"{name}.{index}" for index in range(len(lists[name])))
