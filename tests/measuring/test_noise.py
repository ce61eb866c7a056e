"""Signal-to-noise of second moments: as it is defined, as chance has it, however the tokens come."""

import functools
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dashq.measuring.noise import NoiseWatcher, SignalToNoise
from tensors import noise

MODULE = nn.Identity()


def measured(x: Tensor, tokens: int) -> SignalToNoise:
    watcher = NoiseWatcher(tokens)
    watcher.see(MODULE, (x,))
    ratios = watcher.signal_to_noise()
    assert ratios
    return ratios


def test_it_is_the_mean_over_its_standard_error() -> None:
    x = noise(0, 5, 8, 3).double()
    moments = x.mT @ x / 8
    ratio = moments.mean(0).abs() / (moments.std(0) / 5**0.5)
    ratios = measured(x.float().flatten(0, 1), 8)
    assert ratios.batches == 5
    assert ratios.diagonal[2] == pytest.approx(float(ratio.diagonal().median()), rel=1e-3)
    off = ratio[~torch.eye(3, dtype=torch.bool)].sort().values
    assert ratios.off_diagonal == pytest.approx([float(off[i]) for i in (0, 1, 2, 4, 5)], rel=1e-3)


def test_columns_that_have_nothing_in_common_are_noise_and_those_that_have_are_not() -> None:
    apart = measured(noise(0, 64 * 32, 40), 32)
    assert 0.5 < apart.off_diagonal[2] < 0.9  # the median of |t| is 0.68
    assert apart.diagonal[0] > 10
    shared = measured(noise(0, 64 * 32, 40) + 2 * noise(1, 64 * 32, 1), 32)
    assert shared.off_diagonal[0] > 10


@given(st.integers(1, 5), st.integers(2, 4))
def test_calls_may_bring_any_number_of_batches(tokens: int, batches: int) -> None:
    x = noise(0, batches, tokens, 4)
    watcher = NoiseWatcher(tokens)
    for batch in x:
        watcher.see(MODULE, (batch,))
    assert watcher.signal_to_noise() == measured(x, tokens)


@pytest.mark.parametrize("cut", range(5))
def test_shares_are_added_up_in_their_order(cut: int) -> None:
    x = noise(0, 4, 8, 3)
    whole, parts = NoiseWatcher(8), [NoiseWatcher(8), NoiseWatcher(8)]
    for number, share in enumerate(x):
        for watcher in (whole, parts[number >= cut]):
            watcher.see(MODULE, (share,))
            watcher.end_share()
    one, other = (functools.reduce(operator.add, watcher._shares) for watcher in parts)
    assert (one + other).batches == 4
    ratios = whole.signal_to_noise()
    assert ratios
    assert ratios.diagonal == pytest.approx(measured(x, 8).diagonal)


def test_wide_layers_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(0, 4, 8, 9)
    monkeypatch.setattr("dashq.measuring.noise.COLUMNS", 5)
    sampled = measured(x, 8)
    assert sampled == measured(x[..., ::2], 8)


def test_what_never_was_active_has_no_signal() -> None:
    assert measured(torch.zeros(6, 4), 2).off_diagonal == (0.0,) * 5


@pytest.mark.parametrize("shape", [(8, 3), (16, 1)])
def test_one_batch_or_one_column_tells_nothing(shape: tuple[int, int]) -> None:
    watcher = NoiseWatcher(8)
    watcher.see(MODULE, (noise(0, *shape),))
    assert watcher.signal_to_noise() is None
