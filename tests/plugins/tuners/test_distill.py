"""The default tuner's loss is the divergence of the predictions, and its rates rise and fall for each kind."""

import math
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from dashq import Tunable
from dashq_plugins.tuners.distill import WARM_UP, Distill
from tensors import noise

SEEDS = st.integers(0, 2**16)


def tunables() -> list[Tunable]:
    kinds: tuple[Literal["scale", "offset", "norm"], ...] = ("scale", "offset", "scale", "norm")
    return [Tunable(kind, str(index), nn.Parameter(torch.zeros(3))) for index, kind in enumerate(kinds)]


@given(SEEDS, st.floats(0.5, 4), st.floats(0, 1))
def test_the_loss_is_that_of_its_definition(seed: int, temperature: float, share: float) -> None:
    original, quantized = noise(seed, 2, 5, 7).double()
    words = torch.randint(7, (5,), generator=torch.Generator().manual_seed(seed))
    p, q = (original / temperature).softmax(-1), (quantized / temperature).softmax(-1)
    divergence = temperature**2 * (p * (p / q).log()).sum()
    cross_entropy = -quantized.softmax(-1)[range(5), words].log().sum()
    loss = Distill(temperature=temperature, next_token_share=share).loss(original, quantized, words)
    torch.testing.assert_close(loss, (1 - share) * divergence + share * cross_entropy)


@given(SEEDS)
def test_the_same_predictions_have_no_loss_and_no_gradient(seed: int) -> None:
    original = noise(seed, 5, 7)
    quantized = (original + 3).requires_grad_()  # a constant changes no prediction
    loss = Distill().loss(original, quantized, torch.zeros(5, dtype=torch.int64))
    loss.backward()
    assert quantized.grad is not None
    assert abs(float(loss.detach())) < 1e-5
    assert float(quantized.grad.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("rates", "kinds"),
    [({}, {"scale", "offset", "norm"}), ({"scales": 0}, {"offset", "norm"}), ({"norms": 0, "offsets": 0}, {"scale"})],
)
def test_a_rate_of_0_switches_a_kind_off(rates: dict[str, Any], kinds: set[str]) -> None:
    own = tunables()
    optimizer = Distill(**rates).optimizer(own)
    chosen = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {tunable.kind for tunable in own if id(tunable.parameter) in chosen} == kinds
    assert len(chosen) == sum(tunable.kind in kinds for tunable in own)


def test_kinds_that_a_model_lacks_are_left_out() -> None:
    scales = [tunable for tunable in tunables() if tunable.kind == "scale"]
    assert len(Distill().optimizer(scales).param_groups) == 1


def test_rates_rise_from_0_then_fall_to_0_along_a_cosine() -> None:
    tuner = Distill(samples=100, scales=0.5, norms=0.1)
    own = tunables()
    optimizer = tuner.optimizer(own)
    rates = []
    for step in range(tuner.steps):
        tuner.step(optimizer, step / tuner.steps)
        rates.append([group["lr"] for group in optimizer.param_groups])
    scales = [scale for scale, *_ in rates]
    peak = scales.index(max(scales))
    assert peak + 1 == WARM_UP * tuner.steps
    assert scales[0] == pytest.approx(0.5 / (WARM_UP * tuner.steps), rel=1e-3)
    assert all(one < other for one, other in pairwise(scales[: peak + 1]))
    assert all(one > other for one, other in pairwise(scales[peak:]))
    assert scales[50] == pytest.approx(0.5 * 0.5)
    assert 0 < scales[-1] < 0.001
    assert all(norm == pytest.approx(0.2 * scale) for scale, _, norm in rates)


def test_the_norm_of_all_gradients_is_bounded() -> None:
    own = tunables()
    tuner = Distill(clip=0.5)
    for tunable in own[:-1]:  # one has none
        tunable.parameter.grad = torch.full((3,), 10.0)
    tuner.step(tuner.optimizer(own), 0.0)
    gradients = [tunable.parameter.grad for tunable in own[:-1]]
    assert math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None)) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": 0, "offsets": 0, "norms": 0}, "nothing learns"),
        ({"scales": -1}, "greater than or equal to 0"),
        ({"norms": float("inf")}, "finite"),
        ({"temperature": 0}, "greater than 0"),
        ({"next_token_share": 1.5}, "less than or equal to 1"),
        ({"clip": 0}, "greater than 0"),
        ({"samples": 0}, "greater than 0"),
        ({"scale": 1}, "Did you mean 'scales'"),
    ],
)
def test_values_without_a_meaning_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Distill(**fields)


@pytest.mark.parametrize(("samples", "batch", "epochs", "steps"), [(120, 1, 1, 120), (5, 2, 3, 9), (4, 8, 1, 1)])
def test_steps_are_batches_times_epochs(samples: int, batch: int, epochs: int, steps: int) -> None:
    assert Distill(samples=samples, batch=batch, epochs=epochs).steps == steps
