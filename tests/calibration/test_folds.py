"""Folds add up what they see share by share, in an order that does not depend on who saw it."""

import queue
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dashq import Estimator, Layer
from dashq.calibration import folds
from dashq.calibration.folds import Fold, FoldSums
from dashq.processes.group import Processes
from recipes import REGISTRY
from tensors import noise

FULL: Estimator = REGISTRY.estimators["full"].model_validate({})
LAYER = Layer(name="layer", rows=6, columns=6)


def folded(batches: list[Tensor], ends: bool = True) -> Fold:
    """A fold of batches, each of which is a share where it `ends` one."""
    fold = Fold(LAYER, FULL)
    for x in batches:
        fold.see(x, torch.full((len(x),), 0.5), x + 1)
        if ends:
            fold.end_share()
    return fold


def test_sums_are_those_of_all_tokens() -> None:
    batches = [noise(seed, 7, 6) for seed in range(4)]
    x = torch.cat(batches)
    for ends in (True, False):
        sums = folded(batches, ends).sums()
        assert (sums.tokens, sums.weight, sums.squares, sums.effective_tokens) == (28, 14, 7, 28)
        torch.testing.assert_close(FULL.finish(sums.state).dense(), x.T @ x / 28)
        assert sums.input_shift is not None
        torch.testing.assert_close(sums.input_shift, torch.ones(28, 6).T @ x)


def test_a_fold_that_saw_nothing_has_an_empty_state() -> None:
    fold = Fold(LAYER, FULL)
    fold.end_share()
    sums = fold.sums()
    assert (sums.tokens, sums.effective_tokens, sums.input_shift) == (0, 0.0, None)
    assert not FULL.finish(sums.state).diagonal().any()


def test_shares_without_a_token_change_nothing() -> None:
    batches = [noise(seed, 7, 6) for seed in range(2)]
    fold = Fold(LAYER, FULL)
    for x in batches:
        fold.end_share()
        fold.see(x, torch.full((7,), 0.5), x + 1)
        fold.end_share()
    assert FULL.finish(fold.sums().state).dense().equal(FULL.finish(folded(batches).sums().state).dense())


class Talking(Processes):
    """A process that is a thread, and speaks to the others through queues."""

    wires: ClassVar[Mapping[tuple[int, int], "queue.Queue[Any]"]]

    def send(self, tree: Any, rank: int) -> None:
        self.wires[self.rank, rank].put(tree)

    def receive(self, like: Any, rank: int, device: torch.device) -> Any:
        return self.wires[rank, self.rank].get(timeout=60)


@pytest.mark.parametrize("solvers", [{0}, {1}, {2}, {0, 1, 2}])
@pytest.mark.parametrize("cuts", [(0, 0), (1, 2), (0, 4), (2, 2), (1, 4)])
def test_processes_add_shares_in_their_order(
    cuts: tuple[int, int], solvers: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [noise(seed, 7, 6) for seed in range(4)]
    expected = FULL.finish(folded(batches).sums().state).dense()
    own = [batches[: cuts[0]], batches[cuts[0] : cuts[1]], batches[cuts[1] :]]
    monkeypatch.setattr(Talking, "wires", {pair: queue.Queue() for pair in product(range(3), repeat=2)}, raising=False)
    this = threading.local()
    monkeypatch.setattr(folds, "here", lambda: this.process)

    def collected(rank: int) -> FoldSums | None:
        this.process = Talking(rank, 3)
        return folded(own[rank]).collected(solvers, torch.device("cpu"))

    with ThreadPoolExecutor() as threads:
        results = [*threads.map(collected, range(3))]
    for rank, sums in enumerate(results):
        assert (sums is not None) == (rank in solvers)
        if sums:
            assert FULL.finish(sums.state).dense().equal(expected)
            assert sums.tokens == 28
