"""The shares of calibration samples: fixed by the recipe alone, so that sums do not depend on who forms them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dashq.errors import ProcessesError
from dashq.processes.group import here
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Calibration

# Tokens per forward pass of a block: enough to keep matrix products busy, few enough to stay small beside a block.
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Shares:
    """Samples cut into batches, and successive batches into shares of about equal size.

    Each process has some successive shares. Everything else depends on the samples alone.
    """

    samples: int
    samples_per_batch: int
    most: int

    @classmethod
    def of(cls, plans: Sequence[LayerPlan], text: Calibration) -> "Shares":
        """Batches as large as memory likes them, or smaller so that there are as many as the recipe has shares.

        Where that is possible they are cut at multiples of the chunks that an estimator compares.
        """
        whole = max(1, TOKENS_PER_BATCH // text.sequence_length)
        chunk = math.lcm(*{plan.scheme.estimator.chunk_tokens for plan in plans}, text.sequence_length)
        step = min(whole, chunk // text.sequence_length)
        return cls(text.samples, step * max(1, min(whole // step, text.samples // (text.shares * step))), text.shares)

    @property
    def count(self) -> int:
        """The number of shares."""
        return min(self.most, self._batches)

    @property
    def own_samples(self) -> slice:
        """This process's samples."""
        own = here().own(self.count)
        return slice(self._start(own.start) * self.samples_per_batch, self._start(own.stop) * self.samples_per_batch)

    @property
    def own_batches(self) -> list[range]:
        """The batches of each share of this process, counted from its first one."""
        own = here().own(self.count)
        first = self._start(own.start)
        return [range(self._start(share) - first, self._start(share + 1) - first) for share in own]

    def check(self, processes: int) -> None:
        """Raise a `ProcessesError` where there are more processes than shares."""
        if processes > self.count:
            key = "shares" if self.count == self.most else "samples"
            raise ProcessesError(
                f"{processes} processes are more than the {self.count} shares that the samples of the recipe make, "
                f"in batches of {self.samples_per_batch}: use at most {self.count}, or raise calibration.{key}, which "
                "changes the last digits of the result"
            )

    @property
    def _batches(self) -> int:
        return -(-self.samples // self.samples_per_batch)

    def _start(self, share: int) -> int:
        """The first batch of a share."""
        return share * self._batches // self.count
