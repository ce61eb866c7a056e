"""Passes that pause before each stage give what passes from the beginning give, and leave nothing behind."""

import copy
import gc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dashq.calibration.paused
import dashq.calibration.stream
from dashq import CheckpointError, Recipe, make_plan
from dashq.calibration.paused import PausedPasses, passes_pause, paused_bytes
from dashq.calibration.stream import Stream
from dashq.model.decoder import Block, Model
from dashq.quantizing.opening import open_model
from pico import pico_model
from recipes import TEXT, build_recipe

TOKENS = torch.arange(5 * 24).reshape(5, 24) % 300
QKV, OUT, GATE_UP, DOWN = STAGES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def recipe_of(model: Path, **text: Any) -> Recipe:
    return build_recipe(model, model.with_name("out"), dtype="float32", calibration=TEXT | text)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A llama, whose five samples are three batches."""
    monkeypatch.setattr(dashq.calibration.stream, "TOKENS_PER_BATCH", 50)
    return open_model(recipe_of(pico_model("llama", tmp_path / "model")))


@pytest.fixture
def stream(model: Model) -> Stream:
    with torch.no_grad():
        return Stream(model, TOKENS)


@pytest.fixture
def block(model: Model, stream: Stream) -> Iterator[Block]:
    with torch.no_grad(), model.block(0) as block:
        yield block


def names(block: Block, *stage: str) -> list[str]:
    """The full names of layers that are called `q`, `k`, …"""
    return [name for short in stage for name in block.linears if name.endswith(f"{short}_proj")]


def all_names(block: Block) -> list[str]:
    return [name for stage in STAGES for name in names(block, *stage)]


def given(block: Block, name: str, stream: Stream) -> list[Tensor]:
    """What each batch gives a layer as the block is now."""
    inputs: list[Tensor] = []
    handle = block.linears[name].register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    list(stream.outputs(block))
    handle.remove()
    return inputs


def test_each_stage_is_given_what_a_pass_from_the_beginning_gives_it(stream: Stream, block: Block) -> None:
    expected_stream = stream.twin()
    with closing(PausedPasses(stream, block, all_names(block))) as passes:
        for stage in STAGES:
            layers = names(block, *stage)
            paused = list(passes.inputs(layers))
            assert len(paused) == 3
            for x, expected in zip(paused, given(without_hooks(block), layers[0], stream), strict=True):
                assert x is not None
                assert x.equal(expected)
            for name in layers:  # as a solver does, while the passes pause
                block.replace_weight(name, block.weight(name).round(decimals=1))
        passes.finish()
    expected_stream.advance(block)
    assert all(one.equal(other) for one, other in zip(stream.batches, expected_stream.batches, strict=True))


def without_hooks(block: Block) -> Block:
    """A copy of the block as it is now, that pauses nowhere."""
    module = copy.deepcopy(block.module)
    for part in module.modules():
        part._forward_pre_hooks.clear()
    return replace(block, module=module)


def test_a_block_that_pauses_is_passed_once(stream: Stream, block: Block) -> None:
    calls: list[nn.Module] = []
    block.module.register_forward_pre_hook(lambda module, _: calls.append(module))
    with closing(PausedPasses(stream, block, all_names(block))) as passes:
        for stage in STAGES:
            list(passes.inputs(names(block, *stage)))
        passes.finish()
    assert len(calls) == 3  # one for each batch


def test_passes_that_are_given_up_unwind_their_frames_and_leave_no_hook(stream: Stream, block: Block) -> None:
    left: list[str] = []

    class Watched(nn.Module):
        """The MLP, which notes when its frame ends."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            try:
                result: Tensor = self.inner(x)
            finally:
                left.append("frame")
            return result

    layers = all_names(block)
    block.module.mlp = Watched(block.module.get_submodule("mlp"))
    linears = {name.replace(".inner", ""): module for name, module in block.linears.items()}
    pausing = [name for name in block.linears if name.replace(".inner", "") in layers]
    with closing(PausedPasses(stream, block, pausing)) as passes:
        for stage in STAGES[:3]:
            list(passes.inputs(names(block, *stage)))
        assert left == []
    assert left == ["frame"] * 3
    assert not any(module._forward_pre_hooks for module in linears.values())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_a_pass_comes_out_where_the_pass_was_asked_to_go_on(
    error: type[BaseException], stream: Stream, block: Block
) -> None:
    batches: list[nn.Module] = []

    def fail(module: nn.Module, _: object) -> None:
        batches.append(module)
        if len(batches) == 2:
            raise error("in the second batch")

    handle = block.module.get_submodule("mlp").register_forward_pre_hook(fail)
    before = stream.batches
    with closing(PausedPasses(stream, block, all_names(block))) as passes:
        for stage in (QKV, OUT):
            list(passes.inputs(names(block, *stage)))
        with pytest.raises(error, match="in the second batch"):
            list(passes.inputs(names(block, *GATE_UP)))
    handle.remove()
    assert all(one is other for one, other in zip(stream.batches, before, strict=True))
    assert not any(module._forward_pre_hooks for module in block.linears.values())


def test_the_grad_mode_of_the_caller_holds_inside_passes_and_is_left_alone_by_them(
    stream: Stream, block: Block
) -> None:
    modes: list[bool] = []
    block.module.get_submodule("mlp").register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    with closing(PausedPasses(stream, block, all_names(block))) as passes:
        list(passes.inputs(names(block, *QKV)))
        with torch.enable_grad():  # a solver may compute gradients while passes pause
            pass
        list(passes.inputs(names(block, *OUT)))
        list(passes.inputs(names(block, *GATE_UP)))
        assert not torch.is_grad_enabled()
    assert modes == [False] * 3


def test_layers_in_another_order_in_some_batches_are_refused(stream: Stream, block: Block) -> None:
    with closing(PausedPasses(stream, block, all_names(block))) as passes:
        (name,) = names(block, *OUT)
        with pytest.raises(CheckpointError, match=rf"q_proj is called before {name} in some batches only"):
            list(passes.inputs([name]))


def test_layers_that_share_their_inputs_in_some_batches_only_are_refused(stream: Stream, block: Block) -> None:
    batches: list[nn.Module] = []

    def part(module: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        batches.append(module)
        return inputs[0].clone() if len(batches) == 2 else None

    block.module.get_submodule("self_attn.k_proj").register_forward_pre_hook(part)
    with closing(PausedPasses(stream, block, all_names(block))) as passes:
        list(passes.inputs(names(block, *QKV)))
        with pytest.raises(CheckpointError, match=r"k_proj is given the inputs of other layers in some batches only"):
            list(passes.inputs(names(block, *OUT)))


def test_a_batch_that_reaches_no_layer_gives_none(stream: Stream, block: Block) -> None:
    batches: list[Any] = []

    def skip(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        batches.append(output)

    vars(block.module.get_submodule("mlp"))["forward"] = lambda x: x
    block.module.get_submodule("mlp").register_forward_hook(skip)
    with closing(PausedPasses(stream, block, all_names(block))) as passes:
        for stage in (QKV, OUT):
            list(passes.inputs(names(block, *stage)))
        assert list(passes.inputs(names(block, *GATE_UP))) == [None] * 3
        passes.finish()
    assert len(batches) == 3


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "phi3"])
def test_paused_passes_hold_no_more_than_was_said(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashq.calibration.stream, "TOKENS_PER_BATCH", 500)
    recipe = recipe_of(pico_model(family, tmp_path / "model"), samples=20, sequence_length=200)
    model = open_model(recipe)
    plans = make_plan(recipe, model.layers())
    tokens = torch.arange(20 * 200).reshape(20, 200) % 300
    with torch.no_grad():
        stream = Stream(model, tokens)
    with torch.no_grad(), model.block(0) as block:
        layers = [plan.layer.name for plan in plans if plan.layer.block == block.name]
        before = tensor_bytes()
        with closing(PausedPasses(stream, block, layers)) as passes:
            while any(arrived := [passes._go_on(batch) for batch in range(len(stream.batches))]):
                del arrived
                assert tensor_bytes() - before <= paused_bytes(model, plans, recipe.calibration)


def tensor_bytes() -> int:
    """Bytes of all tensors that there are, each storage once."""
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and not each.is_meta]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def test_passes_pause_where_layers_come_in_turn_and_memory_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pico_model("llama", tmp_path / "model")

    def pauses(free: int, **text: Any) -> bool:
        monkeypatch.setattr(dashq.calibration.paused, "free_memory", lambda device: free)
        recipe = recipe_of(folder, **text)
        model = open_model(recipe)
        return passes_pause(model, make_plan(recipe, model.layers()), recipe.calibration)

    held = 3 * 40 * (6 * 48 + 80) * 4  # tokens, widths, bytes
    assert pauses(2 * held, propagate="sequential")
    assert not pauses(2 * held - 1, propagate="sequential")
    assert not pauses(2 * held, propagate="sequential", error_correction=0.5)
    assert pauses(4 * held, propagate="sequential", error_correction=0.5)
    assert not pauses(4 * held, propagate="quantized")
