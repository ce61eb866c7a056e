"""Calibration batches flow through the blocks as through the whole model, however they are cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import dashq.calibration.stream
from dashq import CheckpointError
from dashq.calibration.stream import StopForward, Stream
from dashq.quantizing.opening import open_model
from pico import pico_model
from recipes import build_recipe

REFUSED = {
    "zamba2": r"model: model\.layers\.3\.\S* is the same weight as model\.layers\.1\.\S*: blocks that share weights",
    "glm_moe_dsa": "^GlmMoeDsaDecoderLayer: blocks that hand each other more than hidden states are not supported$",
}
TOKENS = torch.arange(5 * 24).reshape(5, 24) % 300


def final_states(model: Path) -> list[Tensor]:
    """What leaves the last block, in batches."""
    opened = open_model(build_recipe(model, model.with_name("out"), dtype="float32"))
    with torch.no_grad():
        stream = Stream(opened, TOKENS)
        for block in opened.walk():
            stream.observe(block)  # moves nothing
            stream.advance(block)
    return list(stream.batches)


# Families that hand their blocks different things: masks of two kinds, position biases, nothing but states; and those
# that have blocks of two kinds.
PLAIN = ["mistral", "gemma3", "bloom", "opt", "gpt2", "gpt_neox"]
HYBRID = ["bamba", "falcon_h1", "olmo_hybrid", "jamba", "kimi_linear", "granitemoehybrid", "qwen3_next", "nemotron_h"]


@pytest.mark.parametrize("family", [*PLAIN, *HYBRID])
def test_batches_of_any_size_end_where_the_whole_model_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico_model(family, tmp_path / "model"), dtype=torch.float32)
    outputs: list[Any] = []
    last = open_model(build_recipe(tmp_path / "model", tmp_path / "out")).blocks[-1]
    model.get_submodule(last).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    expected = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]

    whole = final_states(tmp_path / "model")
    monkeypatch.setattr(dashq.calibration.stream, "TOKENS_PER_BATCH", 50)
    batches = final_states(tmp_path / "model")
    assert [len(batch) for batch in whole] == [5]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    torch.testing.assert_close(whole[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(batches), expected, rtol=1e-4, atol=1e-4)


def test_a_window_longer_than_a_batch_is_a_batch_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashq.calibration.stream, "TOKENS_PER_BATCH", 10)
    batches = final_states(pico_model("llama", tmp_path / "model"))
    assert [len(batch) for batch in batches] == [1] * 5


@pytest.mark.parametrize(("family", "said"), REFUSED.items())
def test_blocks_that_do_not_stand_alone_are_refused(family: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        final_states(pico_model(family, tmp_path / "model"))


@torch.no_grad()
def test_a_pass_ends_where_a_hook_has_seen_enough_and_a_twin_goes_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashq.calibration.stream, "TOKENS_PER_BATCH", 50)
    model = pico_model("llama", tmp_path / "model")
    opened = open_model(build_recipe(model, tmp_path / "out", dtype="float32"))
    stream = Stream(opened, TOKENS)
    twin, called = stream.twin(), list[str]()

    def see(name: str) -> None:
        called.append(name)
        if name == "o_proj":
            raise StopForward

    with opened.block(0) as block:
        for name in ("q_proj", "o_proj"):
            block.module.get_submodule(f"self_attn.{name}").register_forward_pre_hook(lambda *_, name=name: see(name))
        block.module.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda *_: see("down_proj"))
        stream.observe(block, (twin, block))
        assert called == ["q_proj", "o_proj"] * 6  # three batches of each stream
        for hooked in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            block.module.get_submodule(hooked)._forward_pre_hooks.clear()
        before = torch.cat(list(twin.outputs(block)))
        stream.advance(block)
        assert torch.cat(list(twin.outputs(block))).equal(before)
        assert not torch.cat(list(stream.outputs(block))).equal(before)
