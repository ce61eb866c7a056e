"""A token counts a little for the experts that it is not sent to."""

import torch

from dashq_plugins.routers.blended import BlendedRouter

PROBABILITIES, CHOSEN = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[True, True, False]])


def test_other_experts_count_a_token_by_a_fraction() -> None:
    torch.testing.assert_close(
        BlendedRouter(fraction=0.1).token_weights(PROBABILITIES, CHOSEN), torch.tensor([[1.0, 1.0, 0.1]])
    )
