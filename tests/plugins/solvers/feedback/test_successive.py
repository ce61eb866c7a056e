"""Columns rounded in turn: each makes up for the errors of those before it."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dashq_plugins.solvers.feedback.successive import COLUMNS, round_in_turn

ROWS, TOP = 40, 3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_every_column_takes_up_the_errors_before_it(compiled: bool, with_reference: bool) -> None:
    counters.clear()
    generator = torch.Generator().manual_seed(0)
    target, links = (torch.randn(COLUMNS, n, generator=generator) for n in (ROWS, COLUMNS))
    scale = (0.5 + torch.rand(ROWS, generator=generator)).expand(COLUMNS, -1)
    offset = torch.randn(ROWS, generator=generator).expand(COLUMNS, -1)
    reference = target + 0.1 if with_reference else None
    codes, errors = round_in_turn.form(compiled)(target, links, scale, offset, torch.tensor(float(TOP)), reference)
    x = _corrected(target, links, errors)
    assert codes.equal(((x - offset) / scale).round().clamp(0, TOP))
    torch.testing.assert_close(errors, offset + codes * scale - (x if reference is None else reference))
    assert not counters["graph_break"]  # each part would be another call, hundreds of times in a layer


@pytest.mark.parametrize("compiled", [False, True])
def test_columns_are_rounded_to_the_nearest_of_uneven_levels(compiled: bool) -> None:
    counters.clear()
    generator = torch.Generator().manual_seed(1)
    target, links = (torch.randn(COLUMNS, n, generator=generator) for n in (ROWS, COLUMNS))
    scale = torch.randn(ROWS, generator=generator).expand(COLUMNS, -1)  # some have the other sign
    levels, nothing = torch.tensor([-2.0, -0.5, 0.1, 1.5]), torch.zeros(COLUMNS, ROWS)
    codes, errors = round_in_turn.form(compiled)(target, links, scale, nothing, levels[-1], None, levels)
    x = _corrected(target, links, errors)
    distances = ((x / scale)[..., None] - levels).abs()
    torch.testing.assert_close((x / scale - codes).abs(), distances.amin(-1), rtol=1e-4, atol=1e-4)
    assert torch.isin(codes, levels).all()
    torch.testing.assert_close(errors, codes * scale - x)
    assert not counters["graph_break"]


def _corrected(target: Tensor, links: Tensor, errors: Tensor) -> Tensor:
    """The targets less the errors of earlier columns."""
    return target - links.tril(-1) @ errors
