"""Half of the products of pairs of columns is computed, and the other half is filled in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dashq_plugins.estimators.products import STRIPE, add_products, mirrored
from tensors import noise


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(0, 6), st.integers(1, 12) | st.integers(STRIPE - 2, 2 * STRIPE + 2))
def test_the_upper_half_is_that_of_all_products_added_to_what_was_there(seed: int, tokens: int, columns: int) -> None:
    x, counts, sums = noise(seed, tokens, columns), noise(seed + 1, tokens).abs(), noise(seed + 2, columns, columns)
    expected = (sums + x.T @ (counts[:, None] * x)).triu()
    before = x.clone()
    add_products(sums, x, counts)
    torch.testing.assert_close(sums.triu(), expected, rtol=1e-4, atol=1e-5)
    assert x.equal(before)


@given(st.integers(0, 999), st.integers(1, 12))
def test_a_mirrored_matrix_is_symmetric_and_keeps_its_upper_half_whatever_the_lower_one_holds(
    seed: int, columns: int
) -> None:
    sums = noise(seed, columns, columns) + torch.full((columns, columns), float("inf")).tril(-1)
    whole = mirrored(sums)
    assert whole.equal(whole.T)
    assert whole.triu().equal(sums.triu())


@pytest.mark.parametrize("columns", [4 * STRIPE])
def test_most_of_the_lower_half_of_a_wide_layer_is_left_out(columns: int) -> None:
    sums = torch.zeros(columns, columns)
    add_products(sums, torch.ones(1, columns), torch.ones(1))
    assert int(sums.sum()) == columns * (columns + STRIPE) // 2
