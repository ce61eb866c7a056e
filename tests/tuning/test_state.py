"""The state of a tuner comes back from its file bit by bit, and the best parameters are those of the lowest check."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dashq.errors import OutputError
from dashq.results.tuned import TuningCheck
from dashq.tuning.state import TunerState
from tensors import noise

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "SGD without momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adamax": lambda parameters: torch.optim.Adamax(parameters, lr=0.1),
    "ASGD": lambda parameters: torch.optim.ASGD(parameters, lr=0.1),
}


def fresh(optimizer: Optimizer) -> TunerState:
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    return TunerState(parameters, optimizer(parameters))


def step(state: TunerState, seed: int) -> None:
    """One step, in which the last parameter has no gradient."""
    for index, parameter in enumerate(state.parameters[:-1]):
        parameter.grad = noise(seed + index, *parameter.shape)
    state.optimizer.step()
    state.step += 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_on_from_its_file_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    state = fresh(OPTIMIZERS[name])
    state.check(2.0, None)
    for seed in (1, 2):
        step(state, seed)
    state.check(1.5, 0.7)
    state.note = "it stopped"
    state.save(tmp_path / "state")
    loaded = fresh(OPTIMIZERS[name])
    loaded.load(tmp_path / "state")
    assert (loaded.step, loaded.checks, loaded.note) == (state.step, state.checks, state.note)
    for seed in (3, 4):
        step(state, seed)
        step(loaded, seed)
    for own, other in zip([*state.parameters, *state.best], [*loaded.parameters, *loaded.best], strict=True):
        assert own.equal(other)


def test_without_a_file_nothing_changes(tmp_path: Path) -> None:
    state = fresh(OPTIMIZERS["AdamW"])
    state.load(tmp_path / "state")
    assert (state.step, state.checks, list(state.best)) == (0, [], [])


def test_a_check_without_a_number_comes_back(tmp_path: Path) -> None:
    state = fresh(OPTIMIZERS["AdamW"])
    state.check(2.0, None)
    state.check(float("nan"), 1.0)
    state.save(tmp_path / "state")
    loaded = fresh(OPTIMIZERS["AdamW"])
    loaded.load(tmp_path / "state")
    assert loaded.checks[0] == TuningCheck(step=0, divergence=2.0, loss=None)
    assert loaded.checks[1].divergence != loaded.checks[1].divergence


@pytest.mark.parametrize("divergences", [[2.0, 1.0, 3.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 1.0, float("nan")]])
def test_the_best_parameters_are_those_of_the_lowest_check(divergences: list[float]) -> None:
    state = fresh(OPTIMIZERS["SGD without momentum"])
    kept = []
    for seed, divergence in enumerate(divergences):
        kept.append(state.parameters[0].detach().clone())
        state.check(divergence, None)
        step(state, seed)
    state.take_best()
    best = min(range(len(kept)), key=lambda index: (divergences[index] != divergences[index], divergences[index]))
    assert state.parameters[0].equal(kept[best])


def test_a_start_without_a_number_is_the_best_there_is() -> None:
    state = fresh(OPTIMIZERS["SGD without momentum"])
    state.check(float("nan"), None)
    step(state, 1)
    state.take_best()
    assert not state.parameters[0].any()


def broken(content: bytes) -> dict[str, bytes]:
    return {"empty": b"", "cut": content[:-3], "other": b"x" * len(content), "header": content[:8] + b"}" + content[9:]}


@pytest.mark.parametrize("name", ["empty", "cut", "other", "header"])
def test_a_broken_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    state, path = fresh(OPTIMIZERS["AdamW"]), tmp_path / "state"
    state.check(1.0, None)
    state.save(path)
    path.write_bytes(broken(path.read_bytes())[name])
    with pytest.raises(OutputError) as error:
        fresh(OPTIMIZERS["AdamW"]).load(path)
    assert str(error.value).startswith(f"{path} is not as the interrupted run wrote it; --overwrite discards the run")
    assert "\n" not in str(error.value)


def test_a_file_of_other_parameters_is_one_clear_error(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    other = TunerState(parameters, OPTIMIZERS["AdamW"](parameters))
    other.check(1.0, None)
    other.save(tmp_path / "state")
    with pytest.raises(OutputError, match="is not as the interrupted run wrote it"):
        fresh(OPTIMIZERS["AdamW"]).load(tmp_path / "state")


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=rf"cannot write {tmp_path}/gone/state: "):
        fresh(OPTIMIZERS["AdamW"]).save(tmp_path / "gone" / "state")
