"""Layers are solved from the same inputs whether a block's passes pause or begin anew for each stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dashq.calibration.paused
import dashq.calibration.shares
from dashq import make_plan, run
from dashq.calibration.passes import BlockPasses
from dashq.calibration.sequential import sequential_stages
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw_for
from dashq.measuring.judgement import judged_tokens
from dashq.quantizing.opening import open_model
from dashq.results.report import read_report
from family_results import FamilyResults
from interruptions import Interruption, after_layers, weights
from pico import MIXTURES, pico_model
from recipes import FEEDBACK, TEXT, build_recipe, mixture_scheme, small_scheme

# Attention beside the MLP on one norm or on two, a fused projection, states in place of attention, layers of two kinds.
DENSE = ["llama", "gemma3", "gpt_neox", "phi3", "gpt2", "bamba", "olmo_hybrid"]
EXPERTS = ["mixtral", "qwen2_moe", "deepseek_v2", "llama4", "jamba"]


def results(model: Path, tmp_path: Path, scheme: dict[str, Any], **text: Any) -> list[Path]:
    """The results of a run that pauses, and of one that finds no memory to."""
    folders = []
    for name, free in (("paused", 1 << 40), ("repeated", 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dashq.calibration.paused, "free_memory", lambda device, free=free: free)
            patch.setattr(dashq.calibration.shares, "TOKENS_PER_BATCH", 50)  # three batches of 40 tokens
            recipe = build_recipe(model, tmp_path / name, dtype="float32", scheme=scheme, calibration=TEXT | text)
            folders.append(run(recipe))
    return folders


@pytest.mark.parametrize(("family", "correction"), [("llama", 0.0), *((family, 0.5) for family in DENSE)])
def test_a_result_has_the_same_bytes_with_pauses_and_without(
    family: str, correction: float, families: FamilyResults, tmp_path: Path
) -> None:
    text = {"propagate": "sequential", "error_correction": correction}
    paused, repeated = results(
        families.model(family), tmp_path, small_scheme(estimator="hybrid", solver=FEEDBACK), **text
    )
    assert weights(paused) == weights(repeated)
    assert [layer.digest for layer in read_report(paused).layers] == [
        layer.digest for layer in read_report(repeated).layers
    ]


@pytest.mark.parametrize("family", EXPERTS)
def test_so_has_that_of_a_mixture(family: str, families: FamilyResults, tmp_path: Path) -> None:
    assert family in MIXTURES
    text = {"propagate": "sequential", "error_correction": 0.5}
    paused, repeated = results(families.model(family), tmp_path, mixture_scheme(), **text)
    assert weights(paused) == weights(repeated)


def test_layers_that_share_inputs_may_have_estimators_of_their_own(model: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        digests = []
        for free in (1 << 40, 0):
            patch.setattr(dashq.calibration.paused, "free_memory", lambda device, free=free: free)
            recipe = build_recipe(
                model,
                tmp_path / str(free),
                dtype="float32",
                calibration=TEXT | {"propagate": "sequential", "error_correction": 0.5},
                overrides=[{"match": ".*k_proj", "estimator": "full"}],
            )
            report = read_report(run(recipe))
            digests.append([(layer.name, layer.digest) for layer in report.layers])
            estimators = {layer.name.split(".")[-1]: layer.estimator for layer in report.layers}
            assert (estimators["k_proj"], estimators["q_proj"]) == ("full", "diagonal")
    assert digests[0] == digests[1]


@pytest.mark.parametrize("layers", [1, 4, 10])
def test_a_run_that_is_stopped_between_two_stages_is_resumed_with_the_same_bytes(
    layers: int, model: Path, tmp_path: Path
) -> None:
    text = TEXT | {"propagate": "sequential", "error_correction": 0.5}
    whole = run(build_recipe(model, tmp_path / "whole", calibration=text))
    recipe = build_recipe(model, tmp_path / "stopped", calibration=text)
    with pytest.raises(Interruption):
        run(recipe, after_layers(layers))
    assert weights(run(recipe)) == weights(whole)


def test_one_pass_serves_all_stages_of_each_stream(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the original and one of the quantized block for each of three batches, and for each piece to judge on.

    The probe has one besides.
    """
    calls: dict[int, int] = {}

    def count(self: Stream, block: Any, batch: int, hidden: torch.Tensor) -> Any:
        calls[block.index] = calls.get(block.index, 0) + 1
        return original(self, block, batch, hidden)

    original = Stream._call
    monkeypatch.setattr(Stream, "_call", count)
    text = TEXT | {"propagate": "sequential", "error_correction": 0.5}
    recipe = build_recipe(model, tmp_path / "out", calibration=text)
    pieces = len(judged_tokens(draw_for(open_model(recipe), recipe.calibration)))
    run(recipe)
    assert calls == dict.fromkeys(range(3), 3 * 2 + 1 + 2 * pieces)


@torch.no_grad()
def test_a_layer_that_a_block_calls_twice_is_seen_in_passes_from_the_beginning(tmp_path: Path) -> None:
    recipe = build_recipe(pico_model("llama", tmp_path / "model"), tmp_path / "out", dtype="float32")
    model = open_model(recipe)
    plans = make_plan(recipe, model.layers())
    tokens = torch.arange(3 * 24).reshape(3, 24) % 300
    stream = Stream(model, tokens)
    with model.block(0) as block:
        down: nn.Module = block.module.get_submodule("mlp.down_proj")
        block.module.get_submodule("mlp").register_forward_hook(
            lambda module, inputs, output: output + 0 * down(inputs[0].repeat(1, 1, 2)[..., :80])
        )
        own_plans = [plan for plan in plans if plan.layer.block == block.name]
        stages = sequential_stages(block, own_plans, stream)
        assert not stages.called_once
        passes = BlockPasses(block, stages, stream, None, one_pass=False, pause=True)
        seen = {name: each.tokens for stage in stages for name, each in passes.observe(stage).items()}
        passes.finish()
        passes.close()
    assert seen == {plan.layer.name: 72 for plan in own_plans}  # the first call is what a pass ends at
