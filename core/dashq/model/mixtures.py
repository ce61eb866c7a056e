"""One view of all mixtures of experts: which matrices they hold, and what each expert's layers are given."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional
from transformers import Conv1D

ModuleLists = nn.ModuleList | nn.ModuleDict  # what holds experts that are modules


@dataclass(frozen=True)
class Matrix:
    """The place of a weight matrix: a parameter, or slice `index` of a stack of them, as it is or transposed."""

    parameter: str
    transposed: bool
    index: int | None = None
    expert: int | None = None

    def of(self, parameter: Float[Tensor, "..."]) -> Float[Tensor, "rows columns"]:
        """The matrix as a view of its parameter."""
        weight = parameter if self.index is None else parameter[self.index]
        return weight.mT if self.transposed else weight


@dataclass(frozen=True, eq=False)
class Mixture(ABC):
    """The experts of one block, `name` inside it, in the module `parent` with its router."""

    name: str
    experts: nn.Module
    parent: nn.Module
    router: nn.Module
    count: int

    @property
    @abstractmethod
    def matrices(self) -> Mapping[str, Matrix]:
        """The experts' weight matrices by layer name inside the block."""

    @abstractmethod
    def layer_inputs(
        self, expert: int, x: Float[Tensor, "tokens columns"]
    ) -> Iterator[tuple[str, Float[Tensor, "tokens inner"]]]:
        """Each layer's name and its inputs where the expert is given `x`; layers that get `x` itself come first."""

    @abstractmethod
    def output(self, expert: int, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens columns"]:
        """The expert's output for `x`, to be compared with the model's."""


@dataclass(frozen=True, eq=False)
class StackedMixture(Mixture):
    """Experts in parameters [experts, rows, columns], or [experts, columns, rows] where they are `transposed`."""

    transposed: bool

    @property
    def matrices(self) -> Mapping[str, Matrix]:
        return {
            f"{self.name}.{stack}.{expert}": Matrix(f"{self.name}.{stack}", self.transposed, expert, expert)
            for stack in (first_stack(self.experts), "down_proj")
            for expert in range(self.count)
        }

    def layer_inputs(
        self, expert: int, x: Float[Tensor, "tokens columns"]
    ) -> Iterator[tuple[str, Float[Tensor, "tokens inner"]]]:
        first = first_stack(self.experts)
        yield f"{self.name}.{first}.{expert}", x
        inner = activate(self.experts, self._product(first, expert, x), gated=first != "up_proj")
        yield f"{self.name}.down_proj.{expert}", inner

    def output(self, expert: int, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens columns"]:
        inputs = dict(self.layer_inputs(expert, x))
        return self._product("down_proj", expert, inputs[f"{self.name}.down_proj.{expert}"])

    def _product(self, stack: str, expert: int, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        weight = self.experts.get_parameter(stack)[expert]
        biases = getattr(self.experts, f"{stack}_bias", None)
        return functional.linear(
            x, weight.mT if self.transposed else weight, None if biases is None else biases[expert]
        )


@dataclass(frozen=True, eq=False)
class ListedMixture(Mixture):
    """Experts in a list, or a dictionary, of modules made of linear layers."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The experts in order, by their names in the list."""
        return dict(self.experts.named_children())

    @property
    def matrices(self) -> Mapping[str, Matrix]:
        return {
            f"{self.name}.{key}.{name}": Matrix(
                f"{self.name}.{key}.{name}.weight", isinstance(linear, Conv1D), expert=expert
            )
            for expert, (key, module) in enumerate(self.modules.items())
            for name, linear in linear_modules(module)
        }

    def layer_inputs(
        self, expert: int, x: Float[Tensor, "tokens columns"]
    ) -> Iterator[tuple[str, Float[Tensor, "tokens inner"]]]:
        key, module = list(self.modules.items())[expert]
        inputs_of: dict[str, Tensor] = {}

        def note(name: str, linear: nn.Module, inputs: tuple[Float[Tensor, "tokens inner"], ...]) -> None:
            inputs_of[name] = inputs[0]

        handles = [linear.register_forward_pre_hook(partial(note, name)) for name, linear in linear_modules(module)]
        module(x)
        for handle in handles:
            handle.remove()
        for name, inputs in inputs_of.items():
            yield f"{self.name}.{key}.{name}", inputs

    def output(self, expert: int, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens columns"]:
        output: Tensor = list(self.modules.values())[expert](x)
        return output


def linear_modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a block that multiply by one weight matrix, with their names inside the block."""
    return ((name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D))


@dataclass(frozen=True, eq=False)
class Candidate:
    """A module `name` inside a block that looks like `count` experts, in the module `parent` with a router, or none."""

    name: str
    experts: nn.Module
    parent: nn.Module
    router: nn.Module | None
    count: int

    @cached_property
    def mixture(self) -> Mixture | None:
        """The mixture that it is: experts of a known form, and a router beside them."""
        if self.router is None:
            return None
        if isinstance(self.experts, ModuleLists):
            return ListedMixture(self.name, self.experts, self.parent, self.router, self.count)
        transposed = orientation(self.experts)
        if transposed is None:
            return None
        return StackedMixture(self.name, self.experts, self.parent, self.router, self.count, transposed)


class BlockExperts:
    """All of a block that looks like experts, searched for once."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._candidates = tuple(_candidates(block))

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """The mixtures that are understood."""
        return tuple(candidate.mixture for candidate in self._candidates if candidate.mixture)

    @property
    def not_understood(self) -> Mapping[str, str]:
        """Expert weights that no mixture stands for, by name inside the block, each with the reason."""
        reasons: dict[str, str] = {}
        for candidate in self._candidates:
            if candidate.mixture:
                continue
            why = "of unknown form"
            if candidate.router is None:
                why = f"whose router is not found: no weight of {candidate.count} rows beside them"
            for parameter, weight in candidate.experts.named_parameters():
                if weight.dim() == (2 if isinstance(candidate.experts, ModuleLists) else 3):
                    reasons[f"{candidate.name}.{parameter.removesuffix('.weight')}"] = (
                        f"a weight of shape {list(weight.shape)} that looks like one of experts {why}"
                    )
        for name, weight in _loose_matrices(self._block):
            reasons[name] = f"a weight of shape {list(weight.shape)} that looks like one of experts of unknown form"
        return reasons

    @property
    def gates(self) -> set[str]:
        """Linear layers that decide how much an expert counts, by name inside the block: they are never quantized."""
        names: set[str] = set()
        for candidate in self._candidates:
            prefix, router = candidate.name.rpartition(".")[0], candidate.router
            for inner, module in linear_modules(candidate.parent):
                inside_router = router is not None and any(module is part for part in router.modules())
                gates_shared = "." not in inner and module.get_parameter("weight").shape[0] == 1
                if inside_router or gates_shared:
                    names.add(f"{prefix}.{inner}".removeprefix("."))
        return names


def find_router(parent: nn.Module, experts: nn.Module, count: int) -> nn.Module | None:
    """The one module beside the experts with a matrix of one row for each expert, or None."""
    routers = [
        child
        for child in parent.children()
        if child is not experts and any(p.dim() == 2 and p.shape[0] == count for _, p in child.named_parameters())
    ]
    # A shared expert can have a matrix of as many rows by chance; the router is the smallest.
    return min(routers, key=lambda child: sum(p.numel() for p in child.parameters()), default=None)


def indexed_arguments(
    tensors: Sequence[Shaped[Tensor, "..."]],
) -> tuple[Float[Tensor, "tokens columns"], Int[Tensor, "tokens chosen"], Float[Tensor, "tokens chosen"]]:
    """Hidden states, chosen experts and their weights, of a call that has the last two in any order."""
    hidden = tensors[0].reshape(-1, tensors[0].shape[-1])
    index = next(tensor for tensor in tensors[1:] if not tensor.is_floating_point()).reshape(len(hidden), -1)
    weights = next(tensor for tensor in tensors[1:] if tensor.is_floating_point()).reshape(index.shape)
    return hidden, index, weights


def activate(experts: nn.Module, y: Float[Tensor, "tokens rows"], gated: bool) -> Float[Tensor, "tokens inner"]:
    """The step between the two products of an expert in a stack; `gated` ones multiply two halves of the first."""
    from dashq.model.transformers_internals import gated_product  # models may be half imported when this module is

    if gated:
        return gated_product(experts, y)
    result: Tensor = experts.act_fn(y)  # type: ignore[operator]
    return result


def _candidates(block: nn.Module) -> Iterator[Candidate]:
    """Possible experts: modules with parameters of three dimensions, and lists of modules with linear layers."""
    for name, module in block.named_modules():
        stacks = _stacks(module)
        if stacks:
            count = next(iter(stacks.values())).shape[0]
        elif isinstance(module, ModuleLists) and len(module) > 1 and _alike(module):
            count = len(module)
        else:
            continue
        parent = block.get_submodule(name.rpartition(".")[0])
        router = find_router(parent, module, count)
        if stacks or name.endswith("experts") or router is not None:
            yield Candidate(name, module, parent, router, count)


def _stacks(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """A module's own parameters of three dimensions. A convolution has one too, and is no mixture."""
    if isinstance(module, nn.Conv1d):
        return {}
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}


def _loose_matrices(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Matrices of experts that lie in no linear layer and beside no stack, such as a stack written as one matrix."""
    for name, module in block.named_modules():
        loose = "experts" in name.split(".") and not _stacks(module)
        if loose and not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            for parameter, weight in module.named_parameters(recurse=False):
                if weight.dim() == 2:
                    yield f"{name}.{parameter}", weight


def _alike(modules: ModuleLists) -> bool:
    """True if all hold linear layers of the same names and shapes."""
    shapes = [
        [(name, linear.get_parameter("weight").shape) for name, linear in linear_modules(module)]
        for module in modules.children()
    ]
    return bool(shapes[0]) and all(shape == shapes[0] for shape in shapes)


def first_stack(experts: nn.Module) -> str:
    """The parameter that multiplies first: gate and up fused, or up alone."""
    return "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"


def orientation(experts: nn.Module) -> bool | None:
    """True if the stacks are transposed, from their shapes; None where their form is not known."""
    from dashq.model.transformers_internals import has_stacks_transposed, normalizes_outputs  # as in `activate`

    stacks = {name: p.shape for name, p in _stacks(experts).items()}
    first = first_stack(experts)
    if stacks.keys() != {first, "down_proj"} or normalizes_outputs(experts):
        return None
    factor = 2 if first == "gate_up_proj" else 1
    count, a, b = stacks[first]
    same, c, d = stacks["down_proj"]
    if count != same:
        return None
    plain, transposed = (a, b) == (factor * d, c), (a, b) == (d, factor * c)
    if plain and transposed:  # square matrices
        return has_stacks_transposed(experts)
    return transposed if plain or transposed else None
