"""The passes of all batches through one block while its layers are solved, stage by stage."""

from collections.abc import Sequence
from itertools import repeat

from dashq.calibration.layers import Observation
from dashq.calibration.observe import observe_block, observe_inputs
from dashq.calibration.paused import PausedPasses
from dashq.calibration.sequential import OriginalBlock, Stages
from dashq.calibration.stream import Stream
from dashq.model.decoder import Block
from dashq.recipe.plan import LayerPlan


class BlockPasses:
    """Observes the layers of each stage, and moves the streams behind the block at the end.

    The layers that are in order are seen in one pass, which pauses before each stage; or, where `pause` is False since
    paused passes would take too much memory, in one pass for each stage, from the block's beginning.
    """

    def __init__(
        self, block: Block, stages: Stages, stream: Stream, original: OriginalBlock | None, one_pass: bool, pause: bool
    ) -> None:
        """With `one_pass` the stream moves on to the outputs of the block as it is before its layers are solved."""
        self._block, self._stages, self._stream, self._original = block, stages, stream, original
        self._one_pass, self._moved = one_pass, False
        self._paused = self._paused_original = None
        if pause and stages.in_order and stages.called_once:
            names = [plan.layer.name for stage in stages.in_order for plan in stage]
            self._paused = PausedPasses(stream, block, names)
            self._paused_original = PausedPasses(original.stream, original.block, names) if original else None

    def observe(self, stage: Sequence[LayerPlan]) -> dict[str, Observation]:
        """The observation of each layer of the stage, by name; stages are asked for in their order."""
        in_order = stage is not self._stages.rest
        if self._paused and in_order:
            names = [plan.layer.name for plan in stage]
            originals = self._paused_original.inputs(names) if self._paused_original else repeat(None)
            return observe_inputs(stage, self._paused.inputs(names), originals, self._stream)
        compared = any(plan.layer.expert is None for plan in stage)  # experts keep to their own weights
        if self._paused:  # the rest is seen in passes of its own
            self._paused.close()
        if self._paused_original and compared:
            self._paused_original.close()
            self._paused_original = None
        self._moved = self._one_pass
        until = stage[-1].layer.name if in_order else ""
        return observe_block(
            self._block, stage, self._stream, self._one_pass, self._original if compared else None, until
        )

    def finish(self) -> None:
        """Move the streams on behind the block, as its layers are now."""
        if self._original and self._paused_original:
            self._paused_original.finish()
        elif self._original:
            self._original.stream.advance(self._original.block)
        if self._paused and not self._stages.rest:
            self._paused.finish()
        elif not self._moved:
            self._stream.advance(self._block)

    def close(self) -> None:
        """Give up what was not finished."""
        for passes in (self._paused, self._paused_original):
            if passes:
                passes.close()
