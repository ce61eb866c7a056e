"""A run in several processes leaves the same bytes as in one, and ends as one where something is wrong."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import load_recipe, run
from dashq.calibration import strips
from dashq.errors import UsageError
from dashq.measuring import continuation
from dashq.processes.group import ALONE, TIMEOUT, Processes, check_alike, here, joined, timeout
from dashq.results.folder import TUNING
from family_results import FamilyResults
from interruptions import Interruption, after_layers, weights
from recipes import FEEDBACK, REGISTRY, mixture_scheme, small_recipe, small_scheme, write_recipe
from spread import STRIPS, run_spread, run_together

TEXT = {"dataset": "pydoc", "samples": 8, "sequence_length": 32}
CORRECTED = {**TEXT, "propagate": "sequential", "error_correction": 0.5}
TUNER = {"name": "distill", "samples": 5, "sequence_length": 40, "batch": 3}
COUPLED: dict[str, Any] = {"estimator": {"name": "hybrid", "chunk": 16}, "solver": FEEDBACK}
# One of every way that blocks are passed, solvers of both kinds, mixtures in stacks and what lies outside the blocks.
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "original": ("llama", {"calibration": TEXT, "embeddings": {"bits": 4}}),
    "budget": ("llama", {"calibration": TEXT, "budget": 5}),
    "quantized": ("qwen3", {"calibration": {**TEXT, "propagate": "quantized"}}),
    "sequential": ("llama", {"calibration": CORRECTED, "scheme": small_scheme(**COUPLED)}),
    "mixture": ("mixtral", {"calibration": TEXT, "scheme": mixture_scheme(router="blended", pooling_tokens=16)}),
    "mixture in turn": (
        "qwen2_moe",
        {"calibration": CORRECTED, "scheme": mixture_scheme(**COUPLED, pooling_tokens=16)},
    ),
    "tuned": ("llama", {"calibration": TEXT, "embeddings": {"bits": 4}, "tuner": TUNER}),
    "tuned mixture": (
        "mixtral",
        {"calibration": TEXT, "scheme": mixture_scheme(), "tuner": {**TUNER, "batch": 2, "epochs": 2}},
    ),
}


@pytest.fixture(scope="module")
def cases(families: FamilyResults, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, Any]]:
    """Recipes as plain data, without an output."""
    return {
        name: small_recipe(families.model(family), Path("-"), dtype="float32", device="cpu", **changes)
        for name, (family, changes) in CASES.items()
    }


class Results:
    """The results of all cases with each number of processes, one launch for each number."""

    def __init__(self, cases: Mapping[str, dict[str, Any]], folder: Path) -> None:
        self._cases, self._folder = cases, folder

    def recipe(self, name: str, count: int) -> Path:
        """The file of a case's recipe, whose result is for so many processes."""
        folder = self._folder / str(count)
        folder.mkdir(exist_ok=True)
        path = folder / f"{name.replace(' ', '-')}.yaml"
        return write_recipe(path, self._cases[name] | {"output": str(path.with_suffix(""))})

    def folder(self, name: str, count: int) -> Path:
        """The result of a case with so many processes."""
        path = self.recipe(name, count).with_suffix("")
        if not path.exists():
            if count == 1:
                run(load_recipe(self.recipe(name, 1), REGISTRY))
            else:
                outcomes = run_spread(count, [self.recipe(case, count) for case in self._cases])
                assert [outcome.code for outcome in outcomes] == [0] * count, outcomes
                assert not any(outcome.output for outcome in outcomes[1:])
        return path


@pytest.fixture(scope="module", autouse=True)
def runs_as_in_other_processes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in STRIPS.items():
            patch.setattr(strips, name, value)
        patch.setattr(continuation, "LARGEST", 2e9)  # as it is in the other processes
        yield


@pytest.fixture(scope="module")
def spread_results(cases: Mapping[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Results:
    torch.set_num_threads(1)
    return Results(cases, tmp_path_factory.mktemp("spread"))


def reported(folder: Path) -> list[Any]:
    """The layers of a report, without the seconds that they took, and how its tuning and its judgement went."""
    report = json.loads((folder / "report.json").read_text())
    layers = [{key: value for key, value in layer.items() if key != "seconds"} for layer in report["layers"]]
    return [*layers, report["tuned"], report["judgement"]]


@pytest.mark.parametrize("name", CASES)
def test_several_processes_leave_the_same_bytes_as_one(name: str, spread_results: Results) -> None:
    one, several = spread_results.folder(name, 1), spread_results.folder(name, 3)  # whose shares differ
    assert weights(several) == weights(one)
    assert reported(several) == reported(one)


def test_eight_processes_leave_the_same_bytes_as_one(spread_results: Results, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", {**spread_results._cases["mixture"], "output": str(tmp_path / "out")})
    assert [outcome.code for outcome in run_spread(8, [path])] == [0] * 8
    assert weights(tmp_path / "out") == weights(spread_results.folder("mixture", 1))


def test_a_run_goes_on_with_another_number_of_processes(spread_results: Results, tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path / "recipe.yaml",
        {**spread_results._cases["sequential"], "output": str(tmp_path / "out")},
    )
    with pytest.raises(Interruption):
        run(load_recipe(path, REGISTRY), after_layers(10))
    assert not (tmp_path / "out" / "report.json").exists()
    assert [outcome.code for outcome in run_spread(2, [path])] == [0, 0]
    assert weights(tmp_path / "out") == weights(spread_results.folder("sequential", 1))


KILLED = """
import os, signal, sys
from pathlib import Path
from dashq import load_recipe, run
from dashq.results.events import Tuning
from dashq.tuning import loop
from dashq.calibration import strips
from recipes import REGISTRY
from spread import STRIPS
vars(strips).update(STRIPS)
loop.SAVE_SECONDS = 0.0
def listen(event):
    if isinstance(event, Tuning) and event.check.step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
run(load_recipe(Path(sys.argv[1]), REGISTRY), listen)
"""


def test_a_tuning_that_was_killed_goes_on_with_another_number_of_processes(
    spread_results: Results, tmp_path: Path
) -> None:
    whole, counts = spread_results.folder("tuned", 1), {"fewer": (2, 1), "more": (1, 2)}
    for name, (before, after) in counts.items():
        recipe = {**spread_results._cases["tuned"], "output": str(tmp_path / name)}
        path = write_recipe(tmp_path / f"{name}.yaml", recipe)
        killed = run_together([["-c", KILLED, str(path)]] * before)
        assert killed[0].code == -9, killed
        assert (tmp_path / name / TUNING).exists()
        assert {outcome.code for outcome in run_spread(after, [path])} == {0}
        assert weights(tmp_path / name) == weights(whole)
        assert reported(tmp_path / name) == reported(whole)


def test_processes_with_different_recipes_are_refused_at_the_start(
    cases: Mapping[str, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = cases["original"] | {"output": str(tmp_path / "out")}
    paths = [write_recipe(tmp_path / f"{bits}.yaml", recipe | {"scheme": small_scheme(bits=bits)}) for bits in (3, 4)]
    outcomes = run_together([["-m", "dashq", "run", str(path)] for path in paths])
    assert [outcome.code for outcome in outcomes] == [2, 2]
    said = "".join(outcome.errors for outcome in outcomes)
    assert re.fullmatch(r"dashq: .*process 1 of 2 would not do the same: recipe's scheme is {'bits': 4.*\n", said), said
    assert not (tmp_path / "out").exists()


def test_more_processes_than_shares_are_refused(cases: Mapping[str, dict[str, Any]], tmp_path: Path) -> None:
    text = {**TEXT, "samples": 1}
    path = write_recipe(
        tmp_path / "recipe.yaml", cases["original"] | {"output": str(tmp_path / "out"), "calibration": text}
    )
    outcomes = run_together([["-m", "dashq", "run", str(path)]] * 2)
    said = "".join(outcome.errors for outcome in outcomes)
    assert "2 processes are more than the 1 shares that the samples of the recipe make" in said
    assert said.count("\n") == 1


FAILS = """
from dashq.errors import CheckpointError
from dashq.processes.group import joined
with joined() as processes:
    if processes.rank == 1:
        raise CheckpointError("the disk is broken")
    processes.of(1, None)
"""
HANGS = """
import time
from dashq.processes import group
group.NOTICE = 0
with group.joined() as processes:
    if processes.rank == 1:
        time.sleep(20)
    processes.of(1, None)
"""


ON_A_DEVICE = """
from dataclasses import replace
import torch
from dashq.processes.group import CPU, joined
from pretend_device import DEVICE, pretended_device
TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.int64)
with joined() as alone, pretended_device():
    own = replace(alone, device=DEVICE)
    assert own.of_all(own.rank) == [0, 1]
    assert own.total([own.rank, 5]) == [1, 10]
    for here in (CPU, DEVICE):
        tree = {"single": torch.tensor(own.rank + 2.5, device=here), "none": None, "empty": torch.ones(0, device=here)}
        tree |= {str(dtype): torch.arange(6, device=here).reshape(2, 3).T.to(dtype) for dtype in TYPES}
        for there in (CPU, DEVICE):
            if own.rank:
                own.send(tree, 0)
            else:
                heard = own.receive(tree, 1, there)
                assert float(heard.pop("single")) == 3.5 and heard.pop("none") is None
                for name, tensor in heard.items():
                    assert tensor.device == there and tensor.dtype == tree[name].dtype
                    assert tensor.cpu().equal(tree[name].cpu())
        numbers = torch.full((2, 3), float(own.rank), device=here)
        own.broadcast([numbers[:1], numbers[1, 1:]], 1)
        assert numbers.tolist() == [[1.0] * 3, [float(own.rank), 1.0, 1.0]]
"""


def test_tensors_travel_on_a_graphics_processor_from_and_to_any_device() -> None:
    outcomes = run_together([["-c", ON_A_DEVICE]] * 2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes


UNEQUAL = """
import os
import torch
from dashq.processes.group import joined
torch.cuda.device_count = lambda: int(os.environ["RANK"])
torch.cuda.set_device = lambda device: None
with joined():
    pass
"""


def test_machines_with_and_without_graphics_processors_are_refused_before_they_wait_for_each_other() -> None:
    for outcome in run_together([["-c", UNEQUAL]] * 2):
        assert "ProcessesError: the first of 2 processes has none of the graphics processors" in outcome.errors
        assert "and process 1 has one: start as many processes on each machine" in outcome.errors
        assert outcome.code == 1


def test_a_process_that_fails_is_named_and_ends_the_others() -> None:
    first, second = run_together([["-c", FAILS]] * 2)
    assert re.search(r"CheckpointError: process 1 of 2 on \S+: the disk is broken", second.errors)
    assert (first.code, first.output, first.errors) == (2, "", "")


def test_a_process_that_does_not_answer_is_given_up() -> None:
    first, _ = run_together([["-c", HANGS]] * 2, DASHQ_TIMEOUT="3")
    assert "ProcessesError: another process has ended, or did not answer for 3 seconds (DASHQ_TIMEOUT" in first.errors
    assert first.code == 1


def test_alone_a_process_says_nothing_and_hears_itself() -> None:
    assert here() is ALONE
    assert ALONE.is_first
    assert ALONE.of_first(lambda: "word") == "word"
    assert ALONE.of_all(3) == [3]
    assert ALONE.total([1, 2]) == [1, 2]
    check_alike({"version": "1"})
    with joined() as processes:
        assert processes is ALONE
    assert ALONE.traffic == [0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_every_share_is_one_process_s(count: int) -> None:
    shares = [Processes(rank, count).own(8) for rank in range(count)]
    assert [share for own in shares for share in own] == [*range(8)]
    assert all(shares)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_timeout_that_is_no_time_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, text)
    with pytest.raises(UsageError, match=f"^DASHQ_TIMEOUT should be a number of seconds, not '{text}'$"):
        timeout()
