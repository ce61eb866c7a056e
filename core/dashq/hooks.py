"""The hooks of a plugin: one for each of the six kinds of strategy, and two for programs that open results.

A plugin is a module or an object that implements some of them, marked with `hookimpl`. Each is called once when a
registry is loaded, takes no arguments, and returns what the plugin brings.
"""

from collections.abc import Iterable

import pluggy

from dashq.programs import Program, Target
from dashq.strategies import Estimator, Grouper, Router, Serializer, Solver, Tuner

PROJECT = "dashq"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def dashq_estimators() -> Iterable[type[Estimator]]:
    """Curvature estimators: what calibration learns about a layer's inputs."""
    return ()


@hookspec
def dashq_solvers() -> Iterable[type[Solver]]:
    """Solvers: how codes, scales and offsets are chosen."""
    return ()


@hookspec
def dashq_groupers() -> Iterable[type[Grouper]]:
    """Grouping strategies: which columns share a scale."""
    return ()


@hookspec
def dashq_routers() -> Iterable[type[Router]]:
    """Mixture-of-experts routers: how much a calibration token counts for an expert."""
    return ()


@hookspec
def dashq_serializers() -> Iterable[type[Serializer]]:
    """Serializers: what a checkpoint file holds."""
    return ()


@hookspec
def dashq_tuners() -> Iterable[type[Tuner]]:
    """Tuners: how scales, offsets and norms learn from the original model."""
    return ()


@hookspec
def dashq_programs() -> Iterable[Program]:
    """Programs that open checkpoints of a format without dashq, for `dashq verify --with`."""
    return ()


@hookspec
def dashq_targets() -> Iterable[Target]:
    """Programs to make recipes for, for `dashq init --for`."""
    return ()
