"""A strategy is a record with a name; an interface says what an author must give, and answers the rest itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import PositiveInt, ValidationError
from torch import Tensor
from transformers import LlamaConfig

from dashq import Curvature, Diagonal, Grid, Grouping, Layer, Quantized, StoredLayer
from dashq.data import Contents
from dashq.solving.arithmetic import round_to_nearest
from dashq.strategies import KINDS, Container, Estimator, Grouper, Router, Serializer, Solver, Strategy, Tuner

MEMBERS: Mapping[type, set[str]] = {
    Estimator: {"start", "update", "merge", "finish"},
    Grouper: {"size_for", "group"},
    Solver: {"solve"},
    Router: {"token_weights"},
    Serializer: {"grid", "pack", "unpack"},
    Tuner: {"optimizer", "loss"},
    Container: {"write", "read"},
}


class Halves(Grouper):
    name = "halves"
    most: PositiveInt = 64

    def size_for(self, columns: int) -> int:
        return min(self.most, columns // 2)

    def group(self, weight: Tensor, curvature: Curvature) -> Grouping:
        return Grouping(columns=weight.shape[1], size=self.size_for(weight.shape[1]))


class Rounding(Solver):
    name = "rounding"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        return round_to_nearest(grouping.split(weight), grid, grouping)


class Counting(Estimator):
    name = "counting"

    def start(self, layer: Layer) -> Tensor:
        return torch.zeros(layer.columns)

    def update(self, state: Tensor, x: Tensor, token_weight: Tensor) -> Tensor:
        return state + token_weight.sum()

    def merge(self, state: Tensor, other: Tensor) -> Tensor:
        return state + other

    def finish(self, state: Tensor) -> Diagonal:
        return Diagonal(state)


class Plain(Serializer):
    name = "plain"

    def grid(self, bits: int) -> Grid:
        return Grid(bits=bits, dtype=torch.float16)

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        return {"codes": quantized.codes}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int, size: int, grid: Grid) -> Quantized:
        raise ValueError("nothing was kept")


def test_there_are_six_kinds_and_each_has_an_interface_of_its_own() -> None:
    assert list(KINDS) == ["estimators", "solvers", "groupers", "routers", "serializers", "tuners"]
    assert {kind: f"{interface.__name__.lower()}s" for kind, interface in KINDS.items()} == {
        kind: kind for kind in KINDS
    }
    for interface in KINDS.values():
        assert [other for other in KINDS.values() if issubclass(interface, other)] == [interface]


@pytest.mark.parametrize("interface", MEMBERS, ids=lambda interface: interface.__name__)
def test_an_author_must_give_these_members_and_no_others(interface: type[Any]) -> None:
    assert interface.__abstractmethods__ == MEMBERS[interface]
    with pytest.raises(TypeError, match="abstract"):
        interface()


def test_all_kinds_have_their_members_told() -> None:
    assert MEMBERS.keys() == {*KINDS.values(), Container}


@pytest.mark.parametrize("strategy", [Halves(), Halves(most=8), Rounding(), Counting(), Plain()], ids=repr)
def test_its_name_and_its_parameters_are_what_a_recipe_says_of_it(strategy: Strategy) -> None:
    fields = strategy.model_dump(mode="json")
    assert list(fields) == ["name", *type(strategy).model_fields]
    assert fields.pop("name") == strategy.name
    assert type(strategy).model_validate(fields) == strategy


def test_parameters_are_checked_and_do_not_change() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        Halves(most=0)
    with pytest.raises(ValidationError, match=r"unknown key 'mst'\. Did you mean 'most'\?"):
        Halves.model_validate({"mst": 3})
    with pytest.raises(ValidationError, match="frozen"):
        Halves().most = 3


def test_an_estimator_makes_diagonals_of_any_batches_unless_it_says_otherwise() -> None:
    assert Counting.produces is Diagonal
    assert Counting().chunk_tokens == 1


def test_a_grouper_keeps_the_order_of_columns_unless_it_says_otherwise() -> None:
    assert Halves.reorders is False


def test_a_solver_takes_any_curvature_and_any_plain_grid_and_answers_for_its_groups_unless_it_says_otherwise() -> None:
    assert Rounding.needs is Curvature
    assert (Rounding.objective, Rounding.supports_super_blocks) == ("groups", False)
    Rounding().check(7, Grid(bits=8, dtype=torch.float32, zero="symmetric", negative_scales=True))


def test_a_format_of_shards_that_dashq_alone_opens_says_nothing_more(tmp_path: Path) -> None:
    plain, config = Plain(), LlamaConfig()
    stored = StoredLayer(layer=Layer(name="l", rows=2, columns=8), grid=plain.grid(4), size=4, ordered=False)
    nothing: Any = None  # the default looks at no model
    plain.check([stored])
    plain.check_model(nothing, nothing, [stored], None)
    assert plain.describe([stored], [], config) is None
    assert plain.container(config) is None
    assert (Plain.runtimes_fuse_layers, Plain.stacks_experts, Plain.holds_experts) == (False, False, True)
    assert Plain.files == ()
    (tmp_path / "config.json").write_text("{}")
    assert Plain.recognise(tmp_path) == ()


def test_a_container_names_its_one_file() -> None:
    class Box(Container):
        file = "box.bin"

        def write(self, path: Path, contents: Contents) -> None:
            path.write_bytes(b"box")

        def read(self, path: Path, contents: Contents) -> Mapping[str, Callable[..., Any]]:
            return {}

    assert Box().file == "box.bin"
    assert not hasattr(Container, "file")
