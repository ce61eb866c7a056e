"""A token counts for its experts by the router's probabilities."""

import torch

from dashq_plugins.routers.gated import GatedRouter

PROBABILITIES, CHOSEN = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[True, True, False]])


def test_chosen_experts_count_a_token_by_its_probability() -> None:
    torch.testing.assert_close(GatedRouter().token_weights(PROBABILITIES, CHOSEN), torch.tensor([[0.5, 0.3, 0.0]]))
    torch.testing.assert_close(
        GatedRouter(power=2).token_weights(PROBABILITIES, CHOSEN), torch.tensor([[0.25, 0.09, 0.0]])
    )
