"""Mixtures of experts: what each expert sees, what becomes of it, and what is refused."""

import io
import json
import re
from collections import defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dashq import (
    CheckpointError,
    Curvature,
    Diagonal,
    Full,
    PlanError,
    PluginError,
    Router,
    load_registry,
    make_plan,
    run,
)
from dashq.calibration import experts as watching
from dashq.calibration.experts import MixtureWatcher, shrink, watching_experts
from dashq.calibration.gates import GATES, find_gate
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import calibration_tokens
from dashq.data import Layer
from dashq.model.mixtures import find_mixtures, gate_names, not_understood
from dashq.pipeline import open_model
from dashq.runtime.experts import DashqExperts
from dashq.runtime.linear import DashqLinear
from dashq_cli.plan_table import plan_table
from dashq_cli.progress import bars, print_summary
from pico import MIXTURES, pico_model
from recipes import build_recipe, small_recipe


def scheme(folder: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = small_recipe(folder, folder)["scheme"]
    return base | {"solver": "rtn", "router": "routed", "pooling_tokens": 0} | changes


def mixture_recipe(family: str, folder: Path, **changes: Any) -> Any:
    model = pico_model(family, folder / "model")
    return build_recipe(model, folder / "out", dtype="float32", scheme=scheme(folder, **changes))


def observe(recipe: Any, samples: int = 3) -> tuple[Tensor, dict[str, Any]]:
    """The calibration tokens, and what every layer of the walk sees of them."""
    model = open_model(recipe)
    plans = make_plan(recipe, model.layers())
    tokens = calibration_tokens(recipe.calibration.dataset, model.tokenizer(), samples, tokens=40, seed=0)
    seen: dict[str, Any] = {}
    with torch.no_grad():
        with model.outside():
            stream = Stream(model, tokens)
        for index, name in enumerate(model.blocks):
            with model.block(index) as block:
                mine = [plan for plan in plans if plan.layer.name.startswith(f"{name}.")]
                seen |= observe_block(block, mine, stream, index, one_pass=True)
    return tokens, seen


class Listening(torch.Tensor):
    """A stack of experts that notes what each of its slices is multiplied with, whatever code does it."""

    notes: Any = None
    stack: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            x, weight = args[0], args[1]
            key = getattr(weight, "key", None)
            if key is not None:
                notes = cls.notes
                notes[key].append(x.detach().as_subclass(torch.Tensor).reshape(-1, x.shape[-1]).float())
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, Listening) else a for a in args]
        result = func(*plain, **(kwargs or {}))
        if func is torch.Tensor.__getitem__ and isinstance(args[0], Listening):
            index = args[1]
            result = result.as_subclass(Listening)
            result.key = f"{args[0].stack}.{int(index)}"
        return result


@torch.no_grad()
def inputs_in_whole_model(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """What each expert's matrices are multiplied with in the whole model in memory, run expert by expert."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    notes: dict[str, list[Tensor]] = defaultdict(list)
    Listening.notes = notes
    for name, module in model.named_modules():
        for stack, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 3:
                listening: Any = parameter.detach().as_subclass(Listening)
                listening.stack = f"{name}.{stack}"
                delattr(module, stack)
                setattr(module, stack, listening)
    model(tokens)
    return {name: torch.cat(seen) for name, seen in notes.items()}


@pytest.mark.parametrize("family", [family for family in MIXTURES if family != "llama4"])
def test_every_expert_sees_what_it_sees_in_the_whole_model(family: str, tmp_path: Path) -> None:
    tokens, seen = observe(mixture_recipe(family, tmp_path))
    expected = inputs_in_whole_model(tmp_path / "model", tokens)
    experts = {name: observation for name, observation in seen.items() if ".experts." in name}
    assert experts.keys() >= expected.keys()
    assert len(expected) > len(experts) / 2
    for name, x in expected.items():
        assert experts[name].tokens == len(x) == experts[name].effective_tokens, name
        diagonal = experts[name].curvature.diagonal()
        assert torch.allclose(diagonal, x.square().mean(0), rtol=1e-3, atol=1e-5), name
    assert all(experts[name].tokens == 0 for name in experts.keys() - expected.keys())


def test_experts_that_are_given_all_tokens_at_once_see_those_that_are_theirs(tmp_path: Path) -> None:
    tokens, seen = observe(mixture_recipe("llama4", tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    given: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("feed_forward.experts"):
            module.register_forward_pre_hook(lambda _, inputs, name=name: given.update({name: inputs[0]}))
    with torch.no_grad():
        model(tokens)
    assert len(given) == 3
    for name, x in given.items():
        experts: Any = model.get_submodule(name)
        for expert, share in enumerate(x.chunk(4)):
            mine = share[(share != 0).any(-1)]
            gate, up = (mine @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
            for stack, inputs in (("gate_up_proj", mine), ("down_proj", up * experts.act_fn(gate))):
                observation = seen[f"{name}.{stack}.{expert}"]
                assert observation.tokens == len(mine)
                if len(mine):
                    found = observation.curvature.diagonal()
                    assert torch.allclose(found, inputs.detach().square().mean(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_result_opens_with_the_dequantized_experts(family: str, tmp_path: Path) -> None:
    out = run(mixture_recipe(family, tmp_path))
    original: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    packed: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    mixtures = {name: module for name, module in packed.named_modules() if isinstance(module, DashqExperts)}
    assert mixtures
    for name, module in packed.named_modules():
        if isinstance(module, DashqLinear) and not name.startswith(tuple(mixtures)):
            original.get_submodule(name).weight.data.copy_(module.weight)
    for name, module in mixtures.items():
        experts = original.get_submodule(name)
        transposed = family in ("gpt_oss", "llama4")
        for stack, layers in module.named_children():
            parameter = experts.get_parameter(stack).data
            for expert, layer in enumerate(layers.children()):
                weight = parameter[expert].T if transposed else parameter[expert]
                assert 0 < float((weight - layer.weight).abs().mean()) < float(weight.abs().mean())
                weight.copy_(layer.weight)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, original(ids).logits, rtol=1e-3, atol=1e-3)
        assert packed.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
        plain = packed.dequantize()
        assert not any(isinstance(module, DashqExperts | DashqLinear) for module in plain.modules())
        torch.testing.assert_close(plain(ids).logits, original(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_and_gates_are_no_layers(family: str, tmp_path: Path) -> None:
    model = open_model(mixture_recipe(family, tmp_path))
    names = {layer.name for layer in model.layers()}
    gates = ("mlp.gate", "mlp.router", "feed_forward.router", "shared_expert_gate")
    assert not [name for name in names if name.endswith(gates)]
    assert not model.unclear_weights()
    counted = sum(layer.rows * layer.columns for layer in model.layers())
    blocks = [model.network.get_submodule(block) for block in model.blocks]
    matrices = sum(p.numel() for b in blocks for n, p in b.named_parameters() if p.dim() > 1 and _is_matrix(n))
    kept = sum(p.numel() for b in blocks for n, p in b.named_parameters() if p.dim() == 2 and _is_gate(n))
    assert counted == matrices - kept


def _is_matrix(name: str) -> bool:
    return "bias" not in name and not name.endswith(("conv.weight", "conv1d.weight", "A_log"))


def _is_gate(name: str) -> bool:
    return name.endswith((".gate.weight", ".router.weight", ".router.layer.weight", ".shared_expert_gate.weight"))


def test_some_experts_can_be_left_as_they_are(tmp_path: Path) -> None:
    recipe = mixture_recipe("mixtral", tmp_path)
    skip = [
        {"match": r".*\.1\.mlp\.experts\.gate_up_proj\.(0|2)", "skip": True},
        {"match": r".*\.2\.mlp\.experts\.down.*", "skip": True},
    ]
    out = run(
        build_recipe(
            tmp_path / "model",
            tmp_path / "some",
            dtype="float32",
            scheme=recipe.scheme.model_dump(mode="json"),
            overrides=skip,
        )
    )
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    packed: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    layers = packed.model.layers
    assert layers[1].mlp.experts.gate_up_proj[2].weight.equal(model.model.layers[1].mlp.experts.gate_up_proj[2])
    assert isinstance(layers[1].mlp.experts.gate_up_proj[1], DashqLinear)
    assert layers[2].mlp.experts.down_proj.equal(model.model.layers[2].mlp.experts.down_proj)
    plain = packed.dequantize()
    assert plain.model.layers[1].mlp.experts.gate_up_proj[2].equal(model.model.layers[1].mlp.experts.gate_up_proj[2])


def test_later_blocks_see_quantized_experts_when_the_recipe_says_so(tmp_path: Path) -> None:
    pico_model("mixtral", tmp_path / "model")

    def offsets(propagate: str) -> tuple[Tensor, Tensor]:
        text = {"dataset": "pydoc", "samples": 3, "sequence_length": 40, "propagate": propagate}
        recipe = build_recipe(
            tmp_path / "model", tmp_path / propagate, calibration=text, scheme=scheme(tmp_path, solver="closed_form")
        )
        tensors = load_file(run(recipe) / "model.safetensors")
        name = "model.layers.{}.mlp.experts.gate_up_proj.1.scale"
        return tensors[name.format(0)], tensors[name.format(2)]

    first, last = offsets("original")
    first_again, last_again = offsets("quantized")
    assert first.equal(first_again)
    assert not last.equal(last_again)
    first_in_sequence, _ = offsets("sequential")  # behind the quantized attention of their own block
    assert not first.equal(first_in_sequence)


class Constant(Router):
    name = "constant"
    value: float = 1.0
    tokens: int = 0

    def token_weights(self, probabilities: Any, chosen: Any) -> Any:
        return torch.full((len(probabilities) + self.tokens, probabilities.shape[1]), self.value)


@pytest.mark.parametrize(
    ("router", "complaint"),
    [
        (Constant(value=float("nan")), "gives token weights that are NaN or infinite"),
        (Constant(value=-0.5), "gives negative token weights, down to -0.5"),
        (Constant(tokens=1), "gives [121, 4] where [tokens, experts] is [120, 4]"),
    ],
    ids=["nan", "negative", "shape"],
)
def test_wrong_token_weights_are_refused_with_layer_and_router(router: Router, complaint: str, tmp_path: Path) -> None:
    recipe = mixture_recipe("mixtral", tmp_path)
    recipe = recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update={"router": router})})
    with pytest.raises(PluginError) as error:
        run(recipe)
    assert str(error.value) == f"model.layers.0.mlp.experts: the router 'constant' {complaint}"


def test_an_expert_that_does_not_exist_is_told_how_many_there_are(tmp_path: Path) -> None:
    pico_model("mixtral", tmp_path / "model")
    overrides = [{"match": r".*\.experts\.down_proj\.4", "bits": 4}]
    with pytest.raises(PlanError, match=r"matches no layer.*The experts of a mixture are numbered 0 to 3"):
        run(build_recipe(tmp_path / "model", tmp_path / "out", scheme=scheme(tmp_path), overrides=overrides))


def test_experts_need_a_router_plugin(tmp_path: Path) -> None:
    pico_model("mixtral", tmp_path / "model")
    with pytest.raises(PlanError, match=r"experts\.gate_up_proj\.0 and 23 more: .* no router .*`router: routed`"):
        run(build_recipe(tmp_path / "model", tmp_path / "out"))


class Stack(nn.Module):
    """Experts as transformers stacks them."""

    def __init__(self, gate_up: tuple[int, ...] = (4, 64, 16), down: tuple[int, ...] = (4, 16, 32)) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(gate_up)), nn.Parameter(torch.zeros(down))


class Mixed(nn.Module):
    """A block with experts, and with a router of so many rows."""

    def __init__(self, experts: nn.Module, rows: int) -> None:
        super().__init__()
        self.experts, self.gate = experts, nn.Linear(16, rows)


def test_experts_without_a_router_are_named() -> None:
    reasons = not_understood(Mixed(Stack(), rows=5))
    assert reasons.keys() == {"experts.gate_up_proj", "experts.down_proj"}
    assert "whose router is not found: no weight of 4 rows beside them" in reasons["experts.down_proj"]
    listed = not_understood(Mixed(nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(4)), rows=5))
    assert set(listed) == {f"experts.{expert}.0" for expert in range(4)}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            transformers.DbrxConfig(
                n_layers=1,
                ffn_config={"hidden_size": 48, "ffn_hidden_size": 32, "moe_num_experts": 4},
                attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
                d_model=48,
                n_heads=4,
            ),
            {f"ffn.experts.mlp.{name}" for name in ("w1", "v1", "w2")},
        ),
        (
            transformers.JetMoeConfig(
                num_hidden_layers=1, hidden_size=48, kv_channels=16, num_key_value_heads=2, num_local_experts=4
            ),
            {
                f"{mixture}.{name}_linear.weight"
                for mixture in ("mlp", "self_attention.experts")
                for name in ("input", "output")
            },
        ),
    ],
    ids=["flat", "other names"],
)
def test_experts_kept_in_other_ways_are_named(config: Any, names: set[str]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (block,) = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    assert not find_mixtures(block)
    assert not_understood(block).keys() == names
    assert all("of experts of unknown form" in reason for reason in not_understood(block).values())


def test_a_convolution_is_no_mixture() -> None:
    block = nn.Module()
    block.mixed, block.conv1d = Mixed(Stack(), rows=4), nn.Conv1d(48, 48, 4, groups=48)
    assert [mixture.name for mixture in find_mixtures(block)] == ["mixed.experts"]
    assert not not_understood(block)


def test_stacks_of_another_form_are_named() -> None:
    more = Mixed(Stack(gate_up=(6, 64, 16)), rows=6)  # experts without a second matrix
    assert not find_mixtures(more)
    assert (
        "a weight of shape [6, 64, 16] that looks like one of experts of unknown form"
        in not_understood(more)["experts.gate_up_proj"]
    )
    strange = Mixed(Stack(down=(4, 16, 31)), rows=4)
    assert not find_mixtures(strange)
    assert (
        "a weight of shape [4, 16, 31] that looks like one of experts of unknown form"
        in not_understood(strange)["experts.down_proj"]
    )
    assert gate_names(strange) == {"gate"}


class Expert(nn.Module):
    """A gated expert of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(48, 32, bias=False), nn.Linear(48, 32, bias=False)
        self.down_proj = nn.Linear(32, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return product


class ListOfExperts(nn.Module):
    """A mixture as models wrote it before experts were stacked; `power` is that of the sum of its experts."""

    def __init__(
        self, gate: Any = torch.sigmoid, chosen: int = 2, share: bool = False, names: str = "", power: int = 1
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(48, 4, bias=False)
        experts = [Expert() for _ in range(4)]
        self.experts = nn.ModuleDict(dict(zip(names, experts, strict=True))) if names else nn.ModuleList(experts)
        self.shared_experts = Expert()
        self.function, self.chosen, self.share, self.power = gate, chosen, share, power

    def weights(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores: Tensor = self.gate(hidden)
        weights, index = self.function(scores).topk(self.chosen)
        return (weights / weights.sum(-1, keepdim=True) if self.share else weights), index

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.reshape(-1, x.shape[-1])
        weights, index = self.weights(hidden)
        result = torch.zeros_like(hidden)
        for expert, module in enumerate(self.experts.children()):
            tokens, places = torch.where(index == expert)
            if len(tokens):
                result[tokens] += module(hidden[tokens]) * weights[tokens, places, None]
        shared: Tensor = self.shared_experts(hidden)
        return (result**self.power + 0.5 * shared).reshape(x.shape)


def block_of(mixture: nn.Module) -> tuple[nn.Module, Tensor]:
    """A block with a mixture, and what is given to it."""
    torch.manual_seed(0)
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.3)
    block = nn.Module()
    block.mlp = mixture
    return block, torch.randn(2, 20, 48)


def fold(block: nn.Module, part: nn.Module, recipe: Any, x: Tensor) -> dict[str, Any]:
    """What the layers of the only mixture in a block learn from one batch through a part of it."""
    (mixture,) = find_mixtures(block)
    layers = [
        Layer(name=f"block.{name}", rows=32, columns=32 if "down" in name else 48, expert=matrix.expert)
        for name, matrix in mixture.matrices.items()
    ]
    watcher = MixtureWatcher("block", mixture, make_plan(recipe, layers))
    with torch.no_grad(), watching_experts(watcher):
        part(x)
    return dict(watcher.observations())


@pytest.mark.parametrize("names", ["", "abcd"], ids=["list", "dictionary"])
def test_experts_in_a_list_see_what_they_are_given(names: str, tmp_path: Path) -> None:
    block, x = block_of(ListOfExperts(names=names))
    recipe = build_recipe(tmp_path, tmp_path / "out", scheme=scheme(tmp_path))
    (mixture,) = find_mixtures(block)
    given: dict[str, list[Tensor]] = {name: [] for name in mixture.matrices}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given[name].append(inputs[0])

    for name in mixture.matrices:
        block.get_submodule(name).register_forward_pre_hook(partial(note, name))
    with torch.no_grad():
        block.get_submodule("mlp")(x)
    expected = {name: torch.cat(inputs) for name, inputs in given.items()}
    seen = fold(block, block.get_submodule("mlp"), recipe, x)
    assert gate_names(block) == {"mlp.gate"}
    assert [matrix.expert for matrix in mixture.matrices.values()] == [e for e in range(4) for _ in range(3)]
    assert len(expected) == 12
    for name, inputs in expected.items():
        assert seen[f"block.{name}"].tokens == len(inputs)
        assert torch.allclose(seen[f"block.{name}"].curvature.diagonal(), inputs.square().mean(0), rtol=1e-4)


def odd(scores: Tensor) -> Tensor:
    """A gate that no score goes through alone and unchanged."""
    return scores.sigmoid() * scores.sigmoid().roll(1, dims=-1)


@pytest.mark.parametrize("share", [False, True], ids=["as it is", "divided by its sum"])
@pytest.mark.parametrize(
    "gate", [partial(torch.softmax, dim=-1), torch.sigmoid, odd], ids=["softmax", "sigmoid", "odd"]
)
def test_experts_in_a_list_are_weighted_by_their_own_gate(gate: Any, share: bool, tmp_path: Path) -> None:
    block, x = block_of(mlp := ListOfExperts(gate, share=share))
    recipe = build_recipe(tmp_path, tmp_path / "out", scheme=scheme(tmp_path, router="gated"))
    seen = fold(block, mlp, recipe, x)
    hidden = x.reshape(-1, 48)
    with torch.no_grad():
        weights, index = mlp.weights(hidden)
        probabilities = mlp.function(mlp.gate(hidden))
    if gate is odd:  # then the model's own weights are all there is to know
        probabilities = torch.zeros(40, 4).scatter(1, index, weights)
    for expert in range(4):
        tokens = (index == expert).any(1)
        expected = probabilities[tokens, expert] @ hidden[tokens].square() / probabilities[tokens, expert].sum()
        found = seen[f"block.mlp.experts.{expert}.up_proj"].curvature.diagonal()
        assert torch.allclose(found, expected, rtol=1e-3), expert


def test_a_list_whose_experts_are_not_added_up_is_refused(tmp_path: Path) -> None:
    block, x = block_of(mlp := ListOfExperts(power=2))
    recipe = build_recipe(tmp_path, tmp_path / "out", scheme=scheme(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"^block\.mlp\.experts: ListOfExperts computes its experts in a way that"
    ):
        fold(block, mlp, recipe, x)


@given(
    gate=st.sampled_from(GATES),
    chosen=st.integers(1, 4),
    factor=st.floats(0.1, 4),
    seed=st.integers(0, 99),
)
def test_the_gate_is_found_by_the_weights_it_gives(gate: Any, chosen: int, factor: float, seed: int) -> None:
    scores = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    scores = scores.abs() if gate is torch.relu else scores  # they are probabilities already
    values = gate(scores)
    picked = torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(chosen).indices, True)
    shares = values * picked / (values * picked).sum(1, keepdim=True)
    assert find_gate(scores, values * picked, picked) is gate
    if chosen > 1:
        assert find_gate(scores, factor * shares, picked) is gate
    assert find_gate(scores, values.flip(0) * picked, picked) is not gate


@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_shrinking_is_linear_in_every_entry(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 5, 5, generator=generator)
    full = shrink(Full(a), Full(b), share)
    diagonal = shrink(Diagonal(a.diagonal()), Diagonal(b.diagonal()), share)
    assert isinstance(full, Full)
    assert torch.allclose(full.matrix, (1 - share) * a + share * b)
    assert torch.allclose(full.diagonal(), diagonal.diagonal())


def test_a_curvature_that_cannot_be_shrunk_is_told_what_to_do() -> None:
    class Other(Curvature):
        def diagonal(self) -> Tensor:
            return torch.ones(3)

    with pytest.raises(PluginError, match="`pooling_tokens: 0`"):
        shrink(Other(), Other(), 0.5)


class OtherWayRound(nn.Module):
    """Experts that look like any others and compute something else."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for token, (experts, shares) in enumerate(zip(index, weights, strict=True)):
            for expert, share in zip(experts, shares, strict=True):
                up, gate = (self.gate_up_proj[expert] @ hidden[token]).chunk(2)  # the other way round
                result[token] += share * (self.down_proj[expert] @ (self.act_fn(gate) * up))
        return result


def test_experts_that_compute_otherwise_than_they_look_are_refused(tmp_path: Path) -> None:
    recipe = mixture_recipe("mixtral", tmp_path)
    model = open_model(recipe)
    plans = make_plan(recipe, model.layers())
    tokens = calibration_tokens(recipe.calibration.dataset, model.tokenizer(), samples=2, tokens=40, seed=0)
    with torch.no_grad(), model.outside():
        stream = Stream(model, tokens)
    with torch.no_grad(), model.block(0) as block:
        mlp: Any = block.module.get_submodule("mlp")
        experts = mlp.experts
        mlp.experts = OtherWayRound(experts)
        mine = [plan for plan in plans if plan.layer.name.startswith("model.layers.0.")]
        with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.experts: OtherWayRound computes its expe"):
            observe_block(block, mine, stream, 0, one_pass=True)
        mlp.experts = experts


def test_few_tokens_shrink_an_expert_towards_what_it_would_make_of_all(tmp_path: Path) -> None:
    recipe = mixture_recipe("mixtral", tmp_path)
    every = build_recipe(
        tmp_path / "model", tmp_path / "e", dtype="float32", scheme=scheme(tmp_path, router="every_expert")
    )
    pooled = build_recipe(
        tmp_path / "model", tmp_path / "p", dtype="float32", scheme=scheme(tmp_path, pooling_tokens=30)
    )
    _, own = observe(recipe)
    _, all_tokens = observe(every)
    _, shrunk = observe(pooled)
    shares = set()
    for name, observation in shrunk.items():
        if ".experts." not in name:
            assert observation.shrinkage == 0
            continue
        share = 30 / (30 + observation.tokens) if observation.tokens else 1
        shares.add(round(share, 3))
        assert observation.shrinkage == pytest.approx(share)
        expected = all_tokens[name].curvature.diagonal()
        if observation.tokens:
            expected = torch.lerp(own[name].curvature.diagonal(), expected, share)
        assert torch.allclose(observation.curvature.diagonal(), expected, rtol=1e-3, atol=1e-6), name
    assert len(shares) > 3


def test_an_expert_without_a_token_takes_the_pooled_estimate(tmp_path: Path) -> None:
    recipe = mixture_recipe("mixtral", tmp_path)
    router = Constant(value=0.0)
    nothing = recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update={"router": router})})
    every = recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update={"router": Constant()})})
    _, pooled = observe(nothing)
    _, seen = observe(every)
    experts = [name for name in pooled if ".experts." in name]
    for name in experts:
        assert pooled[name].effective_tokens == 0
        assert pooled[name].shrinkage == 1
        assert torch.allclose(pooled[name].curvature.diagonal(), seen[name].curvature.diagonal(), rtol=1e-4)


def test_estimators_are_shown_few_tokens_at_a_time_and_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = mixture_recipe("mixtral", tmp_path, router="blended", pooling_tokens=30)
    _, at_once = observe(recipe)
    shown: list[int] = []
    update = type(recipe.scheme.estimator).update

    def note(self: Any, state: Any, x: Tensor, token_weight: Tensor) -> Any:
        shown.append(len(x))
        return update(self, state, x, token_weight)

    monkeypatch.setattr(watching, "TOKENS_AT_A_TIME", 7)
    monkeypatch.setattr(type(recipe.scheme.estimator), "update", note)
    _, in_parts = observe(recipe)
    experts = [name for name in at_once if ".experts." in name]
    assert shown.count(7) > 2 * len(experts)
    assert 0 not in shown
    for name in experts:
        assert in_parts[name].effective_tokens == pytest.approx(at_once[name].effective_tokens)
        one, other = (seen[name].curvature.diagonal() for seen in (in_parts, at_once))
        assert torch.allclose(one, other, rtol=1e-4), name


def test_the_report_and_the_summary_tell_the_tokens_of_every_expert(tmp_path: Path) -> None:
    folder = run(mixture_recipe("mixtral", tmp_path))
    report = json.loads((folder / "report.json").read_text())
    mixtures = report["totals"]["mixtures"]
    assert [mixture["name"] for mixture in mixtures[:2]] == [
        "model.layers.0.mlp.experts.gate_up_proj.*",
        "model.layers.0.mlp.experts.down_proj.*",
    ]
    assert all(sum(mixture["tokens"]) == 2 * 3 * 40 for mixture in mixtures)
    starved = [mixture for mixture in mixtures if mixture["starved"] > 0.25]
    assert starved
    console = Console(record=True, width=80, file=io.StringIO())
    print_summary(console, folder)
    said = console.export_text().splitlines()
    for mixture in mixtures[::2]:  # once for both stacks
        name = mixture["name"].removesuffix(".gate_up_proj.*")
        (row,) = [line for line in said if line.startswith(f"{name} ")]
        assert row.split()[1:4] == [str(f(mixture["tokens"])) for f in (min, lambda tokens: int(median(tokens)), max)]
        assert row.rstrip().endswith(bars(mixture["tokens"], width=18).rstrip())
        share = sum(tokens < 64 for tokens in mixture["tokens"]) / 4
        warning = f"warning {name}: {share:.0%} of the experts were sent fewer than 64"
        warnings = [line.rstrip() for line in said if line.startswith(f"warning {name}")]
        assert warnings == [warning] * (share > 0.25)


@given(tokens=st.lists(st.integers(0, 10**6), min_size=1, max_size=300), width=st.integers(1, 64))
def test_the_chart_has_room_for_all_experts(tokens: list[int], width: int) -> None:
    chart = bars(tokens, width)
    assert len(chart) <= width
    if len(tokens) <= width:
        assert [bar == " " for bar in chart] == [count == 0 for count in tokens]
        assert all(chart[a] <= chart[b] for a, b in pairwise(sorted(range(len(tokens)), key=tokens.__getitem__)))


def test_a_plan_shows_experts_alike_in_one_row_that_fits_the_terminal(tmp_path: Path) -> None:
    pico_model("mixtral", tmp_path / "model")
    overrides = [
        {"match": r".*\.1\..*down_proj\.2", "bits": 4},
        {"match": r".*\.2\..*gate_up_proj\.1", "skip": True},
    ]
    recipe = build_recipe(tmp_path / "model", tmp_path / "out", scheme=scheme(tmp_path), overrides=overrides)
    plans = make_plan(recipe, open_model(recipe).layers())
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(plan_table(plans, 80))
    assert all(len(line) <= 80 for line in console.export_text(clear=False).splitlines())
    text = re.sub(r"\.\s*\n\s+", ".", console.export_text())
    rows = {" ".join(line.split()[:-6]): line.split()[-6:] for line in text.splitlines() if "model.layers" in line}
    names = [name.rpartition("experts.")[2] for name in rows if "experts" in name]
    assert names == [
        *("gate_up_proj.0 … 3", "down_proj.0 … 3"),
        *("gate_up_proj.0 … 3", "down_proj.0 … 1", "down_proj.2", "down_proj.3"),
        *("gate_up_proj.0", "gate_up_proj.2 … 3", "down_proj.0 … 3"),
    ]
    assert sum(int(cells[-2].replace(",", "")) for cells in rows.values()) == sum(plan.bytes for plan in plans)


def test_routers_weigh_tokens_as_they_say() -> None:
    probabilities, chosen = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[True, True, False]])
    routers = load_registry().routers

    def weights(name: str, **fields: float) -> list[float]:
        answer = routers[name].model_validate(fields).token_weights(probabilities, chosen)
        return [round(value, 4) for value in answer[0].tolist()]

    assert weights("routed") == [1, 1, 0]
    assert weights("gated") == [0.5, 0.3, 0]
    assert weights("gated", power=2) == [0.25, 0.09, 0]
    assert weights("blended", fraction=0.1) == [1, 1, 0.1]
    assert weights("every_expert") == [1, 1, 1]
