"""Compiled arithmetic gives what the same arithmetic gives as written, and without a compiler nothing breaks."""

import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dashq import Diagonal, Grid, Grouping
from dashq.data import Zero
from dashq.solving import compiled as module
from dashq.solving.arithmetic import group_importance
from dashq.solving.compiled import Compilable, hearing_compilations, materialize
from dashq.solving.stored_values import Levels, store
from recipes import REGISTRY
from tensors import noise

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def example(columns: int) -> tuple[Tensor, Diagonal]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, columns, generator=generator), Diagonal(torch.randn(columns, generator=generator).exp())


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("zero", ["real", "integer", "symmetric"])
@pytest.mark.parametrize("solver", ["irls", "closed_form"])
def test_a_compiled_solver_is_as_good_as_an_eager_one(solver: str, zero: Zero, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, curvature = example(192)
    for size, bits in ((64, 2), (32, 4)):
        grouping, grid = Grouping(columns=192, size=size), Grid(bits=bits, dtype=torch.float16, zero=zero)
        results = []
        for smallest in (0, 1 << 62):
            monkeypatch.setattr(module, "COMPILE_FROM", smallest)
            results.append(REGISTRY.solvers[solver]().solve(weight, curvature, grouping, grid))
        # Sums are added in another order, and products not rounded before they are added to: a tie may fall on the
        # other side, and then an alternation may seldom end elsewhere.
        w, h = grouping.split(weight), group_importance(curvature, grouping)
        compiled, eager = ((h * (w - grouping.split(q.dequantize())).square()).sum(-1) for q in results)
        assert ((compiled - eager).abs() > 1e-3 * eager).float().mean() < 0.03
        torch.testing.assert_close(compiled.sum(), eager.sum(), rtol=3e-3, atol=0)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compilation_is_heard_once_before_it_begins() -> None:
    doubled, values = Compilable(lambda x: 2 * x), torch.ones(8)
    heard: list[str] = []
    with hearing_compilations(lambda: heard.append("compiling")):
        doubled(values)
        assert heard == []
        doubled.compiled(values)
        doubled.compiled(values)
    assert heard == ["compiling"]
    with hearing_compilations(lambda: heard.append("in vain")):
        pass
    Compilable(lambda x: 3 * x).compiled(values)
    assert heard == ["compiling"]


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_grid_stores_is_rounded_to_its_type_in_compiled_arithmetic_too(dtype: torch.dtype) -> None:
    levels = Levels.of(Grid(bits=2, dtype=dtype), torch.empty(0))
    stored = Compilable(lambda scale, offset: store(scale, offset, levels))
    values = noise(0, 1000) * torch.logspace(-9, 6, 1000)
    for compiled, written in zip(stored.compiled(values, values), stored(values, values), strict=True):
        assert compiled.equal(written)
        assert compiled.equal(compiled.to(dtype).float())


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_is_computed_once_has_the_same_value() -> None:
    spread = Compilable(lambda x, y: (x[:, None] * materialize(1 / y)).sum(0))
    x, y = torch.linspace(1, 2, 40), torch.linspace(3, 4, 30)
    torch.testing.assert_close(spread.compiled(x, y), spread(x, y))


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_one_kernel_serves_every_shape() -> None:
    @Compilable
    def sums(x: Tensor, factor: Tensor) -> Tensor:
        return (x * factor).sum(-1)

    before = counters["stats"]["unique_graphs"]
    for rows, size in ((5, 16), (7, 24), (300, 64)):
        x = torch.randn(rows, size)
        torch.testing.assert_close(sums.compiled(x, torch.tensor(2.0)), sums(x, torch.tensor(2.0)))
    assert counters["stats"]["unique_graphs"] == before + 1


def test_without_a_compiler_a_warning_says_so_once_and_all_runs_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: refuses)
    double = Compilable(lambda x: 2 * x)
    with pytest.warns(RuntimeWarning, match="^solving without compiled kernels, which is slower: no compiler here$"):
        assert double.compiled(torch.ones(2)).tolist() == [2, 2]
    assert double.compiled(torch.ones(2)).tolist() == [2, 2]


def test_a_mistake_in_the_input_is_still_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    add = Compilable(torch.add)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="size of tensor"):
        add.compiled(torch.ones(2), torch.ones(3))
