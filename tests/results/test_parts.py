"""The parts of a result are written by the first process, and known to all as they lie in the file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dashq.curvature import Diagonal
from dashq.data import Quantized
from dashq.processes.group import Processes
from dashq.quantizing.opening import open_model, plan_model
from dashq.results import parts as under_test
from dashq.results.clock import Clock
from dashq.results.output import Output
from dashq.results.parts import Parts, layers_by_first, report_by, shared_tensors, tensors_by_first
from dashq.results.workplace import workplace
from dashq.solving import round_to_nearest
from interruptions import LAYER
from recipes import build_recipe
from tensors import noise


class Hearing(Processes):
    """A process that is told what the first one would tell it."""

    def __init__(self, value: Any, tensors: Sequence[Tensor]) -> None:
        super().__init__(rank=1, count=2)
        object.__setattr__(self, "told", (value, tensors))

    def of(self, rank: int, value: Any) -> Any:
        return vars(self)["told"][0]

    def broadcast(self, tensors: Sequence[Tensor], rank: int) -> None:
        for tensor, told in zip(tensors, vars(self)["told"][1], strict=True):
            tensor.copy_(told)


class Telling(Processes):
    """The first of two processes, which notes all that it says."""

    def __init__(self, said: list[Any]) -> None:
        super().__init__(rank=0, count=2)
        object.__setattr__(self, "said", said)

    def of(self, rank: int, value: Any) -> Any:
        vars(self)["said"].append(json.dumps(value))
        return value

    def broadcast(self, tensors: Sequence[Tensor], rank: int) -> None:
        vars(self)["said"].extend(tensors)


class Listening(Telling):
    """The second one, which hears what was said."""

    def of(self, rank: int, value: Any) -> Any:
        return json.loads(vars(self)["said"].pop(0))

    def broadcast(self, tensors: Sequence[Tensor], rank: int) -> None:
        for tensor in tensors:
            tensor.copy_(vars(self)["said"].pop(0))


def test_all_processes_have_the_layers_and_tensors_of_a_result(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, said = build_recipe(model, tmp_path / "out"), list[Any]()
    tensors = {"table": torch.ones(3, 2), "b.scale": torch.rand(4, 1).half(), "b.codes": torch.arange(4).byte()}
    with workplace(recipe.output, False, recipe.format_files) as folder:
        output = Output(folder, recipe, {}, Clock(torch.device("cpu")))
        output.add("model.layers.0", tensors, [LAYER])
        layers = layers_by_first(output, recipe.serializer)
        assert tensors_by_first(output).keys() == tensors.keys()  # alone it tells nobody
        monkeypatch.setattr(under_test, "here", lambda: Telling(said))
        layers_by_first(output, recipe.serializer)
        read = tensors_by_first(output, {"table"})
        assert all(read[name][...].equal(tensor) for name, tensor in tensors.items())
        shared = shared_tensors(output)
        assert [shared[name][...].equal(tensors[name]) for name in ("b.codes", "table")] == [True, True]
    assert [layer.layer.name for layer in layers] == [LAYER.name]
    monkeypatch.setattr(under_test, "here", lambda: Listening(said))
    assert layers_by_first(None, recipe.serializer) == layers
    heard = tensors_by_first(None, {"table"})
    assert heard.keys() == {"b.scale", "b.codes"}
    assert all(
        tensor[...].equal(tensors[name]) and tensor.dtype is tensors[name].dtype for name, tensor in heard.items()
    )
    shared = shared_tensors(None)
    assert shared.keys() == tensors.keys()
    assert [shared[name][...].equal(tensors[name]) for name in ("b.codes", "table")] == [True, True]
    assert not said  # a tensor is sent when it is read


def test_what_the_first_process_reads_all_others_have(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build_recipe(model, tmp_path / "out")
    plan = plan_model(recipe, open_model(recipe))[0]
    name, clock, serializer = plan.layer.name, Clock(torch.device("cpu")), recipe.serializer
    weight = noise(0, plan.layer.rows, plan.layer.columns)
    grouping = plan.scheme.grouper.group(weight, Diagonal(torch.ones(plan.layer.columns)))
    quantized = round_to_nearest(grouping.split(weight), plan.grid, grouping)
    packed = serializer.pack(quantized)
    with workplace(recipe.output, False, recipe.format_files) as folder:
        output = Output(folder, recipe, {}, clock)
        parts = Parts(output, clock)
        assert parts.finished == set()
        parts.add("model.layers.0", {f"{name}.{key}": tensor for key, tensor in packed.items()}, [LAYER])
        output.save()
        read = parts.read("model.layers.0", plan.stored, serializer)
    assert read.keys() == packed.keys()
    told = [packed[key] for key in sorted(packed)]
    monkeypatch.setattr(under_test, "here", lambda: Hearing(["model.layers.0"], told))
    others = Parts(None, clock)
    assert others.finished == {"model.layers.0"}
    others.add("model.layers.1", packed)  # is the first one's to write
    heard = others.read("model.layers.0", plan.stored, serializer)

    def opened(tensors: Any) -> Quantized:
        return serializer.unpack(tensors, plan.layer.columns, plan.size, plan.grid)

    assert opened(heard).dequantize().equal(quantized.dequantize())
    assert opened(read).dequantize().equal(quantized.dequantize())


def test_reports_arrive_as_they_were_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report_by(0, LAYER) == LAYER
    monkeypatch.setattr(under_test, "here", lambda: Hearing(asdict(LAYER), []))
    assert report_by(0, None) == LAYER
