"""Strategies that break one law each, with the law: a default strategy in which one thing is wrong."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dashq import Curvature, Diagonal, Full, Grid, Grouping, Layer, PlanError, Quantized, Tunable
from dashq.solving.arithmetic import round_to_nearest
from dashq.strategies import Strategy
from dashq_plugins.estimators.diagonal import DiagonalEstimator, SquareSums
from dashq_plugins.formats.native import NativeSerializer
from dashq_plugins.groupers.channel import ChannelGrouper
from dashq_plugins.groupers.contiguous import ContiguousGrouper
from dashq_plugins.routers.routed import RoutedRouter
from dashq_plugins.solvers.rtn import RoundToNearestSolver
from dashq_plugins.tuners.distill import Distill


def changed(q: Quantized, **changes: Any) -> Quantized:
    return Quantized(**(vars(q) | changes))


class AveragesPerBatch(DiagonalEstimator):
    name = "averages_per_batch"

    def update(self, state: SquareSums, x: Tensor, token_weight: Tensor) -> SquareSums:
        batch = super().update(super().start(Layer(name="", rows=1, columns=x.shape[1])), x, token_weight)
        return super().merge(
            state, SquareSums(super().finish(batch).values.double(), torch.ones((), dtype=torch.float64))
        )


class ForgetsOneWorker(DiagonalEstimator):
    name = "forgets_one_worker"

    def merge(self, state: SquareSums, other: SquareSums) -> SquareSums:
        return state


class KeepsASet(DiagonalEstimator):
    name = "keeps_a_set"

    def merge(self, state: set[SquareSums], other: set[SquareSums]) -> set[SquareSums]:  # type: ignore[override]
        return {super().merge(next(iter(state)), next(iter(other)))}

    def start(self, layer: Layer) -> set[SquareSums]:  # type: ignore[override]
        return {super().start(layer)}

    def update(self, state: set[SquareSums], x: Tensor, token_weight: Tensor) -> set[SquareSums]:  # type: ignore[override]
        return {super().update(next(iter(state)), x, token_weight)}

    def finish(self, state: set[SquareSums]) -> Diagonal:  # type: ignore[override]
        return super().finish(next(iter(state)))


class IgnoresTokenWeight(DiagonalEstimator):
    name = "ignores_token_weight"

    def update(self, state: SquareSums, x: Tensor, token_weight: Tensor) -> SquareSums:
        return super().update(state, x, torch.ones_like(token_weight))


class DividesByNoTokens(DiagonalEstimator):
    name = "divides_by_no_tokens"

    def finish(self, state: SquareSums) -> Diagonal:
        return Diagonal((state.squares / state.tokens).float())


class ClipsInPlace(DiagonalEstimator):
    name = "clips_in_place"

    def update(self, state: SquareSums, x: Tensor, token_weight: Tensor) -> SquareSums:
        return super().update(state, x.clamp_(-1, 1), token_weight)


class PromisesMore(DiagonalEstimator):
    name = "promises_more"
    produces: ClassVar[type[Curvature]] = Full


class NeedsTokens(DiagonalEstimator):
    name = "needs_tokens"

    def finish(self, state: SquareSums) -> Diagonal:
        if state.tokens == 0:
            raise ZeroDivisionError("no tokens")
        return super().finish(state)


class IgnoresTheGrid(RoundToNearestSolver):
    name = "ignores_the_grid"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        finer = round_to_nearest(grouping.split(weight), Grid(bits=grid.bits + 1, dtype=grid.dtype), grouping)
        return changed(finer, grid=grid)


class KeepsFloat32(RoundToNearestSolver):
    name = "keeps_float32"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        q = super().solve(weight, curvature, grouping, grid)
        return changed(q, scale=q.scale.float(), offset=q.offset.float())


class LosesToRounding(RoundToNearestSolver):
    name = "loses_to_rounding"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        q = super().solve(weight, curvature, grouping, grid)
        return changed(q, codes=(q.codes + 1).clamp_max(grid.top))


class ClaimsTheMoon(RoundToNearestSolver):
    name = "claims_the_moon"
    claims: ClassVar[Any] = ("never_worse_than_minmax", "never_wrong")


class TurnsTheScale(RoundToNearestSolver):
    name = "turns_the_scale"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        q = super().solve(weight, curvature, grouping, grid)
        return changed(q, codes=grid.top - q.codes, scale=-q.scale, offset=q.offset + grid.top * q.scale)


class DrawsLots(RoundToNearestSolver):
    name = "draws_lots"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        return super().solve(weight + 0.1 * torch.randn_like(weight), curvature, grouping, grid)


class CentresInPlace(RoundToNearestSolver):
    name = "centres_in_place"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        return super().solve(weight.sub_(weight.mean()), curvature, grouping, grid)


class ForgetsTheGrouping(RoundToNearestSolver):
    name = "forgets_the_grouping"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        return super().solve(weight, curvature, Grouping(columns=grouping.columns, size=1), grid)


class WantsEvenGroups(RoundToNearestSolver):
    name = "wants_even_groups"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        weight.unflatten(1, (grouping.groups, grouping.size))
        return super().solve(weight, curvature, grouping, grid)


class WantsItsOwnCurvature(RoundToNearestSolver):
    name = "wants_its_own_curvature"
    needs: ClassVar[type[Curvature]] = type("Banded", (Diagonal,), {})


class DropsAColumn(ContiguousGrouper):
    name = "drops_a_column"

    def group(self, weight: Tensor, curvature: Curvature) -> Grouping:
        return Grouping(columns=weight.shape[1] - 1, size=self.size)


class RepeatsAColumn(ContiguousGrouper):
    name = "repeats_a_column"
    reorders: ClassVar[bool] = True

    def group(self, weight: Tensor, curvature: Curvature) -> Grouping:
        columns = weight.shape[1]
        return Grouping(columns=columns, size=self.size, order=torch.arange(columns).clamp_min(1))


class ReordersUnannounced(ContiguousGrouper):
    name = "reorders_unannounced"

    def group(self, weight: Tensor, curvature: Curvature) -> Grouping:
        columns = weight.shape[1]
        return Grouping(columns=columns, size=self.size, order=torch.arange(columns).flip(0))


class ChangesItsMind(ContiguousGrouper):
    name = "changes_its_mind"

    def group(self, weight: Tensor, curvature: Curvature) -> Grouping:
        return Grouping(columns=weight.shape[1], size=self.size // 2)


class SortsInPlace(ChannelGrouper):
    name = "sorts_in_place"

    def group(self, weight: Tensor, curvature: Curvature) -> Grouping:
        return super().group(weight.copy_(weight.sort().values), curvature)


class AcceptsNoWidth(ContiguousGrouper):
    name = "accepts_no_width"

    def size_for(self, columns: int) -> int:
        raise PlanError(f"not {columns} columns")


class PunishesExperts(RoutedRouter):
    name = "punishes_experts"

    def token_weights(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        return torch.where(chosen, 1.0, -probabilities)


class SumsOverExperts(RoutedRouter):
    name = "sums_over_experts"

    def token_weights(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        return chosen.float().sum(-1)


class LosesABit(NativeSerializer):
    name = "loses_a_bit"

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        return super().pack(changed(quantized, codes=quantized.codes & 0b11111110))


class ForgetsTheOrder(NativeSerializer):
    name = "forgets_the_order"

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        return {key: value for key, value in super().pack(quantized).items() if key != "order"}


class PlansOtherTypes(NativeSerializer):
    name = "plans_other_types"

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        tensors = super().pack(quantized)
        return {key: value.float() for key, value in tensors.items()} if quantized.codes.is_meta else tensors


class LooksAtValues(NativeSerializer):
    name = "looks_at_values"

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        return super().pack(changed(quantized, scale=quantized.scale * bool(quantized.scale.max() > 0)))


class NamesATensorBadly(NativeSerializer):
    name = "names_a_tensor_badly"

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        return {key.replace("scale", "grid.scale"): value for key, value in super().pack(quantized).items()}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int, size: int, grid: Grid) -> Quantized:
        return super().unpack({key.replace("grid.", ""): tensors[key] for key in tensors}, columns, size, grid)


class AcceptsNineBits(NativeSerializer):
    name = "accepts_nine_bits"

    def grid(self, bits: int) -> Grid:
        return Grid(bits=bits, dtype=torch.float16)


class AcceptsNoBits(NativeSerializer):
    name = "accepts_no_bits"

    def grid(self, bits: int) -> Grid:
        raise PlanError(f"not {bits} bits")


class HasTypesOfOtherBits(NativeSerializer):
    name = "has_types_of_other_bits"

    def types(self, bits: int) -> Mapping[str, Grid]:
        return {"own": self.grid(bits), "other": self.grid(3)}


class HidesItsUsualType(NativeSerializer):
    name = "hides_its_usual_type"

    def types(self, bits: int) -> Mapping[str, Grid]:
        return {"wide": Grid(bits=bits, dtype=torch.float32)}


class NamesATypeTwice(NativeSerializer):
    name = "names_a_type_twice"

    def types(self, bits: int) -> Mapping[str, Grid]:
        wide = Grid(bits=bits, dtype=torch.float32)
        return {"usual": self.grid(bits), "wide": wide, "broad": wide}


class NeedsNoTime(RoundToNearestSolver):
    name = "needs_no_time"

    def nanoseconds(self, layer: Layer, size: int, grid: Grid) -> float:
        return 0.0


class NeedsNoMemory(DiagonalEstimator):
    name = "needs_no_memory"

    def state_size(self, columns: int) -> int:
        return columns // 64


class HidesAParameter(RoundToNearestSolver):
    name = "hides_a_parameter"
    strength: float = Field(default=1.0, exclude=True)


class HasNoDefaults(RoundToNearestSolver):
    name = "has_no_defaults"
    strength: float


class TunesNothing(Distill):
    name = "tunes_nothing"

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(3)])


class TunesWhatHasValues(Distill):
    name = "tunes_what_has_values"

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        return super().optimizer([tunable for tunable in tunables if tunable.parameter.device.type != "meta"][:1])


class StandsStill(Distill):
    name = "stands_still"

    def step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        pass


class ForgetsItsRate(Distill):
    name = "forgets_its_rate"

    def step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9  # is not saved: a tuning that goes on begins anew
        optimizer.step()


class StepsBeyondNumbers(Distill):
    name = "steps_beyond_numbers"

    def step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1 / progress if progress else float("inf")
        optimizer.step()


class LooksAtTheOriginalAlone(Distill):
    name = "looks_at_the_original_alone"

    def loss(self, original: Tensor, quantized: Tensor, next_tokens: Tensor) -> Tensor:
        return original.logsumexp(-1).sum()


class AveragesOverTokens(Distill):
    name = "averages_over_tokens"

    def loss(self, original: Tensor, quantized: Tensor, next_tokens: Tensor) -> Tensor:
        return super().loss(original, quantized, next_tokens) / len(next_tokens)


class DividesByAProbability(Distill):
    name = "divides_by_a_probability"

    def loss(self, original: Tensor, quantized: Tensor, next_tokens: Tensor) -> Tensor:
        return (quantized.softmax(-1) / (100 * original).softmax(-1)).sum()


class CentresLogitsInPlace(Distill):
    name = "centres_logits_in_place"

    def loss(self, original: Tensor, quantized: Tensor, next_tokens: Tensor) -> Tensor:
        return super().loss(original.sub_(original.mean()), quantized, next_tokens)


class LosesPerToken(Distill):
    name = "loses_per_token"

    def loss(self, original: Tensor, quantized: Tensor, next_tokens: Tensor) -> Tensor:
        return (original - quantized).square().sum(-1)


BROKEN: list[tuple[type[Strategy] | Strategy, str]] = [
    (AveragesPerBatch, "give the same however tokens are cut into batches"),
    (ForgetsOneWorker, "merge two states into what one pass over all tokens gives"),
    (KeepsASet, "run without PluginError: a state that holds a set cannot be sent to other processes or kept"),
    (IgnoresTokenWeight, "count a token of weight k like k tokens"),
    (DividesByNoTokens, "keep its diagonal finite and at least zero, even before it saw a token"),
    (ClipsInPlace, "leave its inputs as they are"),
    (PromisesMore, "produce Full curvature"),
    (NeedsTokens, "run without ZeroDivisionError: no tokens"),
    (IgnoresTheGrid, "keep its codes within 0 and the grid's top"),
    (KeepsFloat32, "give its scale the grid's type"),
    (LosesToRounding, "never have more weighted error than min-max rounding"),
    (ClaimsTheMoon, "claim nothing but never_worse_than_minmax, where it has never_wrong"),
    (TurnsTheScale, "keep every scale above zero"),
    (DrawsLots, "give the same result twice"),
    (CentresInPlace, "leave its inputs as they are"),
    (ForgetsTheGrouping, "keep the grouping and the grid that it was given"),
    (WantsEvenGroups, "run without RuntimeError"),
    (WantsItsOwnCurvature, "run without ValueError: there are examples of Diagonal and Full curvature"),
    (DropsAColumn, "put every column into exactly one group"),
    (RepeatsAColumn, "put every column into exactly one group"),
    (ReordersUnannounced, "say with `reorders` whether"),
    (ChangesItsMind, "make groups of the size that `size_for` tells"),
    (SortsInPlace, "leave its inputs as they are"),
    (AcceptsNoWidth, "accept at least one of 64, 1, 7"),
    (PunishesExperts, "keep its weights finite and at least zero"),
    (SumsOverExperts, "give weights as [tokens, experts]"),
    (LosesABit, "unpack what it packed, bit by bit"),
    (ForgetsTheOrder, "unpack what it packed, bit by bit"),
    (PlansOtherTypes, "pack a layer on the meta device into tensors of the same names, shapes and types"),
    (LooksAtValues, "run without RuntimeError"),
    (NamesATensorBadly, "run without KeyError"),
    (AcceptsNineBits, "refuse 0 and 9 bits with a PlanError"),
    (AcceptsNoBits, "hold 256 columns at 1 to 8 bits"),
    (HasTypesOfOtherBits, "have types of 1 bits where it is asked for them"),
    (HidesItsUsualType, "have the grid of 1 bits among its types, by one name"),
    (NamesATypeTwice, "have no two types with the same grid"),
    (NeedsNoTime, "say with `nanoseconds` a time above zero"),
    (NeedsNoMemory, "say with `state_size` a size above zero"),
    (TunesNothing, "optimize parameters of the tunables alone, at least one"),
    (TunesWhatHasValues, "run without ValueError: optimizer got an empty parameter list"),
    (StandsStill, "change parameters that have gradients"),
    (ForgetsItsRate, "go on from parameters, the optimizer's state and the progress"),
    (StepsBeyondNumbers, "keep parameters finite"),
    (LooksAtTheOriginalAlone, "give a loss that depends on the quantized model's logits"),
    (AveragesOverTokens, "sum its loss over tokens, however they are cut into pieces"),
    (DividesByAProbability, "keep its loss and the gradient of it finite"),
    (CentresLogitsInPlace, "leave its inputs as they are"),
    (LosesPerToken, "give its loss as one number"),
    (HidesAParameter(strength=2.0), "come back from its recipe unchanged"),
    (HasNoDefaults, "run without ValidationError"),
]
