"""Compiled arithmetic gives what the same arithmetic gives as written, and without a compiler nothing breaks."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dashq import Diagonal, Grid, Grouping, pieces
from dashq.fused import fused
from recipes import REGISTRY

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


@pytest.fixture
def no_layer_is_too_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "COMPILE_FROM", 0)
        yield


def example(columns: int) -> tuple[Tensor, Diagonal]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, columns, generator=generator), Diagonal(torch.randn(columns, generator=generator).exp())


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("solver", ["irls", "closed_form"])
def test_a_compiled_solver_is_as_good_as_an_eager_one(
    solver: str, no_layer_is_too_small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, bits in ((64, 2), (32, 4)):
        weight, curvature = example(192)
        grouping, grid = Grouping(columns=192, size=size), Grid(bits=bits, dtype=torch.float16)
        compiled = REGISTRY.solvers[solver]().solve(weight, curvature, grouping, grid)
        monkeypatch.setattr(pieces, "COMPILE_FROM", 1 << 62)
        eager = REGISTRY.solvers[solver]().solve(weight, curvature, grouping, grid)
        monkeypatch.setattr(pieces, "COMPILE_FROM", 0)
        # Sums are added in another order, so that a tie may fall on the other side, seldom and to no effect.
        assert (compiled.codes != eager.codes).float().mean() < 0.01
        errors = [(weight - q.dequantize()).square() @ curvature.values for q in (compiled, eager)]
        torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=0)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_one_kernel_serves_every_shape() -> None:
    @fused
    def sums(x: Tensor, factor: Tensor) -> Tensor:
        return (x * factor).sum(-1)

    before = counters["stats"]["unique_graphs"]
    for rows, size in ((5, 16), (7, 24), (300, 64)):
        x = torch.randn(rows, size)
        torch.testing.assert_close(sums(True)(x, torch.tensor(2.0)), sums(False)(x, torch.tensor(2.0)))
    assert counters["stats"]["unique_graphs"] == before + 1


def test_without_a_compiler_a_warning_says_so_once_and_all_runs_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: refuses)
    double = fused(lambda x: 2 * x)
    with pytest.warns(RuntimeWarning, match="^solving without compiled kernels, which is slower: no compiler here$"):
        assert double(True)(torch.ones(2)).tolist() == [2, 2]
    assert double(True)(torch.ones(2)).tolist() == [2, 2]


def test_a_mistake_in_the_input_is_still_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    add = fused(torch.add)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="size of tensor"):
        add(True)(torch.ones(2), torch.ones(3))
