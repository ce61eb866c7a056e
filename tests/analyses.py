"""Analyses for tests, with costs that a test decides."""

from collections.abc import Mapping, Sequence

from dashq.measuring.analysis import Analysis, Choice, LayerAnalysis
from dashq.measuring.noise import SignalToNoise


def choice(bits: int, cost: float, grouper: str = "contiguous") -> Choice:
    """A choice that costs the model so much."""
    return Choice(bits=bits, grouper={"name": grouper}, size=16, bytes=100 * bits, error=0.1, sensitivity=cost)


def measured(
    name: str, costs: Mapping[int, float], expert: int | None = None, noise: SignalToNoise | None = None
) -> LayerAnalysis:
    """A layer with what it costs at each number of bits."""
    choices = tuple(choice(bits, cost) for bits, cost in costs.items())
    return LayerAnalysis(
        name=name, rows=4, columns=32, expert=expert, tokens=10, signal_to_noise=noise, choices=choices
    )


def analysis(layers: Sequence[LayerAnalysis]) -> Analysis:
    """An analysis of these layers."""
    return Analysis(asked={}, computed="on cpu in float32", seconds=0.0, versions={}, layers=tuple(layers))
