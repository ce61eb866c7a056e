"""The default tuner: the quantized model learns to predict what the original predicts."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor
from torch.nn import functional

from dashq import Tunable, Tuner, hookimpl

WARM_UP = 0.05  # the share of the steps in which the learning rates rise from 0


class Distill(Tuner):
    """AdamW on scales, offsets and norms by the divergence of the predictions from the original's (distillation).

    The loss is T² KL(p ‖ p̂) per token, with both softmaxes at the `temperature` T; `next_token_share` of it can be the
    cross entropy of the text's own next token instead. Learning rates `scales` and `offsets` are in steps between
    neighbouring codes, `norms` in shares of a gain's size, and 0 switches the kind off; they rise in the first steps,
    then fall to 0 along a cosine. `clip` bounds the norm of all gradients together.
    """

    name = "distill"
    scales: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 3e-3
    offsets: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1e-3
    norms: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1e-3
    temperature: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 1.0
    next_token_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _learns_something(self) -> "Distill":
        if not (self.scales or self.offsets or self.norms):
            raise ValueError("one of `scales`, `offsets` and `norms` must be above 0, or nothing learns")
        return self

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        rates = {"scale": self.scales, "offset": self.offsets, "norm": self.norms}
        groups = [
            {"params": own, "rate": rate}
            for kind, rate in rates.items()
            if rate and (own := [tunable.parameter for tunable in tunables if tunable.kind == kind])
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)

    def loss(
        self,
        original: Float[Tensor, "tokens words"],
        quantized: Float[Tensor, "tokens words"],
        next_tokens: Int[Tensor, " tokens"],
    ) -> Float[Tensor, ""]:
        expected = (original / self.temperature).log_softmax(-1)
        predicted = (quantized / self.temperature).log_softmax(-1)
        divergence = functional.kl_div(predicted, expected, reduction="sum", log_target=True)
        loss = (1 - self.next_token_share) * self.temperature**2 * divergence
        if self.next_token_share:
            loss = loss + self.next_token_share * functional.cross_entropy(quantized, next_tokens, reduction="sum")
        return loss

    def step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        rise = min(1.0, (progress + 1 / self.steps) / WARM_UP)
        fall = 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rise * fall
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.clip)
        optimizer.step()


@hookimpl
def dashq_tuners() -> list[type[Tuner]]:
    return [Distill]
