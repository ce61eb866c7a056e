"""The contracts of all kinds of strategy and of curvatures, and examples to try them on, for the tests of plugins."""

from dashq.testing.contracts import (
    check_estimator,
    check_grouper,
    check_router,
    check_serializer,
    check_solver,
    check_strategy,
)
from dashq.testing.curvature import check_curvature
from dashq.testing.examples import (
    GateOutput,
    LowRank,
    Problem,
    TokenBatch,
    block_grids,
    block_problems,
    curvatures,
    gates,
    grids,
    groupings,
    importances,
    problems,
    quantized_layers,
    tokens,
    weights,
)

__all__ = [
    "GateOutput",
    "LowRank",
    "Problem",
    "TokenBatch",
    "block_grids",
    "block_problems",
    "check_curvature",
    "check_estimator",
    "check_grouper",
    "check_router",
    "check_serializer",
    "check_solver",
    "check_strategy",
    "curvatures",
    "gates",
    "grids",
    "groupings",
    "importances",
    "problems",
    "quantized_layers",
    "tokens",
    "weights",
]
