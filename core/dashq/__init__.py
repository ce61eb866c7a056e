"""Compose quantization strategies into a run, and open the results with transformers."""

from dashq.data import (
    Contents,
    Coupled,
    Curvature,
    Diagonal,
    Full,
    Grid,
    Grouping,
    Layer,
    Quantized,
    StoredLayer,
    SuperBlocks,
    Zero,
)
from dashq.errors import (
    CheckpointError,
    DashqError,
    MissingPackageError,
    OutputError,
    PlanError,
    PluginError,
    RecipeError,
    TextError,
    UsageError,
)
from dashq.hooks import hookimpl
from dashq.pipeline import run
from dashq.programs import Opened, Program
from dashq.recipe.plan import LayerPlan, make_plan
from dashq.recipe.recipe import Budget, Calibration, Critical, Override, Recipe, Scheme, TextSource, load_recipe
from dashq.registry import Registry, load_registry
from dashq.results.events import BlockDone, Event, LayerDone, Listener, Measuring, RunStarted
from dashq.results.report import LayerReport
from dashq.runtime.linear import DashqLinear
from dashq.runtime.quantizer import DashqConfig, LayerEntry
from dashq.solving.certificate import Certificate
from dashq.strategies import Container, Estimator, Grouper, Router, Serializer, Solver, Strategy

__all__ = [
    "BlockDone",
    "Budget",
    "Calibration",
    "Certificate",
    "CheckpointError",
    "Container",
    "Contents",
    "Coupled",
    "Critical",
    "Curvature",
    "DashqConfig",
    "DashqError",
    "DashqLinear",
    "Diagonal",
    "Estimator",
    "Event",
    "Full",
    "Grid",
    "Grouper",
    "Grouping",
    "Layer",
    "LayerDone",
    "LayerEntry",
    "LayerPlan",
    "LayerReport",
    "Listener",
    "Measuring",
    "MissingPackageError",
    "Opened",
    "OutputError",
    "Override",
    "PlanError",
    "PluginError",
    "Program",
    "Quantized",
    "Recipe",
    "RecipeError",
    "Registry",
    "Router",
    "RunStarted",
    "Scheme",
    "Serializer",
    "Solver",
    "StoredLayer",
    "Strategy",
    "SuperBlocks",
    "TextError",
    "TextSource",
    "UsageError",
    "Zero",
    "hookimpl",
    "load_recipe",
    "load_registry",
    "make_plan",
    "run",
]
