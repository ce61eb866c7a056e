"""Trees of tensors are sent as JSON and tensors, and arrive as they were."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dashq.errors import PluginError
from dashq.processes.trees import outline, rebuilt, tensors_of


@dataclass(frozen=True, eq=False)
class Sums:
    products: Tensor
    tokens: int
    note: str | None = None


class Pair(NamedTuple):
    left: Any
    right: Any


def sent(tree: Any, like: Any) -> Any:
    return rebuilt(json.loads(json.dumps(outline(tree))), like, iter([*tensors_of(tree)]))


def alike(one: Any, other: Any) -> bool:
    """True where two trees have the same outline and equal tensors."""
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return bool(outline(one) == outline(other)) and all(x.equal(y) for x, y in pairs)


@pytest.mark.parametrize(
    "tree",
    [
        torch.arange(6).view(2, 3),
        Sums(torch.ones(2, dtype=torch.float64), 3, "third"),
        Pair(torch.zeros(()), [torch.ones(0), 2.5]),
        {"a": (True, None), "b": Sums(torch.ones(1), 0)},
        (),
    ],
    ids=["tensor", "dataclass", "named", "dict", "empty"],
)
def test_a_tree_arrives_as_it_was(tree: Any) -> None:
    arrived = sent(tree, tree)
    assert type(arrived) is type(tree)
    assert alike(arrived, tree)


def test_the_outline_has_no_values_of_tensors() -> None:
    assert outline(Sums(torch.ones(2, 1), 3)) == {
        "fields": {"products": {"tensor": "float32", "shape": [2, 1]}, "tokens": 3, "note": None}
    }


def test_a_list_may_have_grown_and_a_tensor_may_be_new() -> None:
    tree = [Sums(torch.ones(2), 1), Sums(torch.zeros(1), 2)]
    assert alike(sent(tree, tree[:1]), tree)
    assert alike(sent(Pair(torch.ones(1), 0), Pair(None, 0)), Pair(torch.ones(1), 0))


@pytest.mark.parametrize("tree", [{1, 2}, {1: "a"}, object(), Sums], ids=["set", "numbers", "object", "class"])
def test_what_is_no_tree_is_refused(tree: Any) -> None:
    with pytest.raises(PluginError, match=r"^a state that holds a \w+ cannot be sent to other processes or kept"):
        outline([tree])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PluginError, match=r"^a state came from another process or from disk that is not built as int"):
        sent(Sums(torch.ones(1), 1), 3)
