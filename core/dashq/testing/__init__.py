"""The contracts of all kinds of strategy, for the tests of plugins."""

from dashq.testing.contracts import (
    check_estimator,
    check_grouper,
    check_router,
    check_serializer,
    check_solver,
    check_strategy,
)

__all__ = [
    "check_estimator",
    "check_grouper",
    "check_router",
    "check_serializer",
    "check_solver",
    "check_strategy",
]
