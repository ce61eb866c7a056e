"""The way of a tuner, as the report keeps it and people read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_TUNED = {"scale": "scales", "offset": "offsets", "norm": "gains of norms"}


@dataclass(frozen=True, kw_only=True)
class TuningCheck:
    """The divergence from the original on held-out text after `step` steps, in nats per token, and the step's loss."""

    step: int
    divergence: float
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The way of a tuner: its name, its text, and its checks.

    `samples` and `held_out` are tokens, `changed` the numbers that it could change, by kind. Of all states at a check,
    the one of the lowest divergence is the result's. `note` says why it stopped early, where it did.
    """

    tuner: str
    samples: int
    held_out: int
    checks: tuple[TuningCheck, ...]
    changed: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def before(self) -> float:
        """The divergence before the first step."""
        return self.checks[0].divergence

    @property
    def best(self) -> TuningCheck:
        """The check of the state that was kept."""
        return min(self.checks, key=lambda check: check.divergence)

    def __str__(self) -> str:
        """The figures in words, as summary and model card show them."""
        if not self.checks:  # the model's predictions were no numbers before the first step
            return f"not tuned: {self.note}"
        best = self.best
        changed = ", ".join(f"{count:,} {_TUNED[kind]}" for kind, count in self.changed.items())
        text = (
            f"divergence from the original {self.before:.3f} → {best.divergence:.3f} nats per token on text that the "
            f"tuner did not learn from, after {best.step} steps of {self.tuner} on {self.samples:,} tokens"
        )
        text += f", which change {changed}" if changed and best.step else ""
        text += "" if best.step else ": nothing is changed, since no later step was better"
        return f"{text}; {self.note}" if self.note else text
