from .curvature import Coupled, Curvature, Diagonal, Full
from .data import (
    Contents,
    Grid,
    Grouping,
    Layer,
    Quantized,
    StoredLayer,
    SuperBlocks,
    Tunable,
    Zero,
)
from .errors import (
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
from .hooks import hookimpl
from .pipeline import run
from .programs import Opened, Program
from .recipe.plan import LayerPlan, make_plan
from .recipe.recipe import Budget, Calibration, Critical, Override, Recipe, Scheme, load_recipe
from .registry import Registry, load_registry
from .results.events import BlockDone, Event, LayerDone, Listener, Measuring, RunStarted, Tuning
from .results.report import LayerReport, Tuned, TuningCheck
from .runtime.linear import DashqLinear
from .runtime.quantizer import DashqConfig, LayerEntry
from .solving.certificate import Certificate
from .strategies import Container, Estimator, Grouper, Router, Serializer, Solver, Strategy, Tuner
from .text_source import TextSource

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
    "Tunable",
    "Tuned",
    "Tuner",
    "Tuning",
    "TuningCheck",
    "UsageError",
    "Zero",
    "hookimpl",
    "load_recipe",
    "load_registry",
    "make_plan",
    "run",
]
