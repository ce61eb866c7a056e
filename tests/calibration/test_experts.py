"""Experts see the tokens that are theirs, weighted by their router, and few tokens are pooled with all."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dashq import CheckpointError, Diagonal, Full, PluginError, Recipe, Router, make_plan, run
from dashq.calibration import experts as watching
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw
from dashq.quantizing.opening import open_model
from family_results import FamilyResults
from observations import observe
from pico import MIXTURES
from recipes import REGISTRY, mixture_recipe


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
    return {name: torch.cat(parts) for name, parts in notes.items()}


@pytest.mark.parametrize("family", [family for family in MIXTURES if family != "llama4"])
def test_every_expert_sees_what_it_sees_in_the_whole_model(
    family: str, families: FamilyResults, tmp_path: Path
) -> None:
    tokens, observations = observe(mixture_recipe(families.model(family), tmp_path / "out"))
    expected = inputs_in_whole_model(families.model(family), tokens)
    experts = {name: observation for name, observation in observations.items() if ".experts." in name}
    assert experts.keys() >= expected.keys()
    assert len(expected) > len(experts) / 2
    for name, x in expected.items():
        assert experts[name].tokens == len(x) == experts[name].effective_tokens, name
        diagonal = experts[name].curvature.diagonal()
        assert torch.allclose(diagonal, x.square().mean(0), rtol=1e-3, atol=1e-5), name
    assert all(experts[name].tokens == 0 for name in experts.keys() - expected.keys())


def test_experts_that_are_given_all_tokens_at_once_see_those_that_are_theirs(
    families: FamilyResults, tmp_path: Path
) -> None:
    tokens, observations = observe(mixture_recipe(families.model("llama4"), tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(families.model("llama4"), dtype=torch.float32)
    expert_inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("feed_forward.experts"):
            module.register_forward_pre_hook(lambda _, inputs, name=name: expert_inputs.update({name: inputs[0]}))
    with torch.no_grad():
        model(tokens)
    assert len(expert_inputs) == 3
    for name, x in expert_inputs.items():
        experts: Any = model.get_submodule(name)
        for expert, share in enumerate(x.chunk(4)):
            own_tokens = share[(share != 0).any(-1)]
            gate, up = (own_tokens @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
            for stack, inputs in (("gate_up_proj", own_tokens), ("down_proj", up * experts.act_fn(gate))):
                observation = observations[f"{name}.{stack}.{expert}"]
                assert observation.tokens == len(own_tokens)
                if len(own_tokens):
                    diagonal = observation.curvature.diagonal()
                    assert torch.allclose(diagonal, inputs.detach().square().mean(0), rtol=1e-3, atol=1e-6)


class Constant(Router):
    name = "constant"
    value: float = 1.0
    tokens: int = 0

    def token_weights(self, probabilities: Any, chosen: Any) -> Any:
        return torch.full((len(probabilities) + self.tokens, probabilities.shape[1]), self.value)


@pytest.fixture
def mixtral(families: FamilyResults, tmp_path: Path) -> Recipe:
    """A recipe for a small Mixtral, without pooling."""
    return mixture_recipe(families.model("mixtral"), tmp_path / "out")


def with_scheme(recipe: Recipe, **changes: object) -> Recipe:
    """The recipe with other strategies or parameters for all layers."""
    return recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("router", "complaint"),
    [
        (Constant(value=float("nan")), "gives token weights that are NaN or infinite"),
        (Constant(value=-0.5), "gives negative token weights, down to -0.5"),
        (Constant(tokens=1), "gives [41, 4] where [tokens, experts] is [40, 4]"),
    ],
    ids=["nan", "negative", "shape"],
)
def test_wrong_token_weights_are_refused_with_layer_and_router(router: Router, complaint: str, mixtral: Recipe) -> None:
    with pytest.raises(PluginError) as error:
        run(with_scheme(mixtral, router=router))
    assert str(error.value) == f"model.layers.0.mlp.experts: the router 'constant' {complaint}"


@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_shrinking_is_linear_in_every_entry(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 5, 5, generator=generator)
    full = Full(a).blended(Full(b), share)
    diagonal = Diagonal(a.diagonal()).blended(Diagonal(b.diagonal()), share)
    assert isinstance(full, Full)
    assert torch.allclose(full.matrix, (1 - share) * a + share * b)
    assert torch.allclose(full.diagonal(), diagonal.diagonal())


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


def test_experts_that_compute_otherwise_than_they_look_are_refused(mixtral: Recipe) -> None:
    model = open_model(mixtral)
    plans = make_plan(mixtral, model.layers())
    with torch.no_grad():
        stream = Stream(model, draw(mixtral.calibration, model.tokenizer).samples)
    with torch.no_grad(), model.block(0) as block:
        mlp: Any = block.module.get_submodule("mlp")
        experts = mlp.experts
        mlp.experts = OtherWayRound(experts)
        own_plans = [plan for plan in plans if plan.layer.block == block.name]
        with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.experts: OtherWayRound computes its expe"):
            observe_block(block, own_plans, stream, one_pass=True)
        mlp.experts = experts


def test_few_tokens_shrink_an_expert_towards_what_it_would_make_of_all(mixtral: Recipe) -> None:
    every_expert = REGISTRY.routers["every_expert"]()
    _, own = observe(mixtral)
    _, all_tokens = observe(with_scheme(mixtral, router=every_expert))
    _, shrunk = observe(with_scheme(mixtral, pooling_tokens=30))
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


def test_an_expert_without_a_token_takes_the_pooled_estimate(mixtral: Recipe) -> None:
    _, pooled = observe(with_scheme(mixtral, router=Constant(value=0.0)))
    _, unpooled = observe(with_scheme(mixtral, router=Constant()))
    experts = [name for name in pooled if ".experts." in name]
    for name in experts:
        assert pooled[name].effective_tokens == 0
        assert pooled[name].shrinkage == 1
        assert torch.allclose(pooled[name].curvature.diagonal(), unpooled[name].curvature.diagonal(), rtol=1e-4)


def test_estimators_are_shown_few_tokens_at_a_time_and_learn_the_same(
    families: FamilyResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = mixture_recipe(families.model("mixtral"), tmp_path / "out", router="blended", pooling_tokens=30)
    _, at_once = observe(recipe)
    lengths: list[int] = []
    update = type(recipe.scheme.estimator).update

    def note(self: Any, state: Any, x: Tensor, token_weight: Tensor) -> Any:
        lengths.append(len(x))
        return update(self, state, x, token_weight)

    monkeypatch.setattr(watching, "TOKENS_AT_A_TIME", 7)
    monkeypatch.setattr(type(recipe.scheme.estimator), "update", note)
    _, in_parts = observe(recipe)
    experts = [name for name in at_once if ".experts." in name]
    assert lengths.count(7) > 2 * len(experts)
    assert 0 not in lengths
    for name in experts:
        assert in_parts[name].effective_tokens == pytest.approx(at_once[name].effective_tokens)
        one, other = (observations[name].curvature.diagonal() for observations in (in_parts, at_once))
        assert torch.allclose(one, other, rtol=1e-4), name
