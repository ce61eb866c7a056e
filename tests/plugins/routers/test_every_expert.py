"""A token counts in full for every expert."""

import torch

from dashq_plugins.routers.every_expert import EveryExpertRouter

PROBABILITIES, CHOSEN = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[True, True, False]])


def test_every_expert_counts_a_token_in_full() -> None:
    torch.testing.assert_close(
        EveryExpertRouter().token_weights(PROBABILITIES, CHOSEN), torch.tensor([[1.0, 1.0, 1.0]])
    )
