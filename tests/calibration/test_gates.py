"""The function from a router's scores to its weights is recognized by the weights."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from dashq.calibration.gates import GATES, find_gate
from tensors import noise


@given(
    gate=st.sampled_from(GATES),
    chosen=st.integers(1, 4),
    factor=st.floats(0.1, 4),
    seed=st.integers(0, 99),
)
def test_the_gate_is_found_by_the_weights_it_gives(gate: Any, chosen: int, factor: float, seed: int) -> None:
    scores = noise(seed, 8, 6)
    scores = scores.abs() if gate is torch.relu else scores  # they are probabilities already
    values = gate(scores)
    picked = torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(chosen).indices, True)
    shares = values * picked / (values * picked).sum(1, keepdim=True)
    assert find_gate(scores, values * picked, picked) is gate
    if chosen > 1:
        assert find_gate(scores, factor * shares, picked) is gate
    assert find_gate(scores, values.flip(0) * picked, picked) is not gate
