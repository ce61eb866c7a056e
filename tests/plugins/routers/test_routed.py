"""A token counts in full for the experts that the model sends it to."""

import torch

from dashq_plugins.routers.routed import RoutedRouter

PROBABILITIES, CHOSEN = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[True, True, False]])


def test_chosen_experts_count_a_token_in_full() -> None:
    torch.testing.assert_close(RoutedRouter().token_weights(PROBABILITIES, CHOSEN), torch.tensor([[1.0, 1.0, 0.0]]))
