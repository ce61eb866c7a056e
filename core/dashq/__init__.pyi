from .curvature import Coupled, Curvature, Diagonal, Full
from .data import (
    Codebook,
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
from .programs import Opened, Program, Target, Wish
from .recipe.plan import LayerPlan, make_plan
from .recipe.recipe import Budget, Calibration, Critical, Override, Recipe, Scheme, load_recipe
from .registry import Registry, load_registry
from .results.events import BlockDone, Event, LayerDone, Listener, Measuring, RunStarted, Tuning
from .results.report import Gaps, Judgement, LayerReport, MixtureReport, Report, Selection, Totals, Tuned, TuningCheck
from .runtime.kernel_use import kernels_in_use, use_kernels
from .runtime.linear import DashqLinear
from .runtime.quantizer import DashqConfig, LayerEntry
from .solving.certificate import Certificate
from .starting import Result, quantize
from .strategies import Container, Estimator, Grouper, Router, Serializer, Solver, Strategy, Tuner
from .text_source import TextSource

__all__ = [
    "BlockDone",
    "Budget",
    "Calibration",
    "Certificate",
    "CheckpointError",
    "Codebook",
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
    "Gaps",
    "Grid",
    "Grouper",
    "Grouping",
    "Judgement",
    "Layer",
    "LayerDone",
    "LayerEntry",
    "LayerPlan",
    "LayerReport",
    "Listener",
    "Measuring",
    "MissingPackageError",
    "MixtureReport",
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
    "Report",
    "Result",
    "Router",
    "RunStarted",
    "Scheme",
    "Selection",
    "Serializer",
    "Solver",
    "StoredLayer",
    "Strategy",
    "SuperBlocks",
    "Target",
    "TextError",
    "TextSource",
    "Totals",
    "Tunable",
    "Tuned",
    "Tuner",
    "Tuning",
    "TuningCheck",
    "UsageError",
    "Wish",
    "Zero",
    "hookimpl",
    "kernels_in_use",
    "load_recipe",
    "load_registry",
    "make_plan",
    "quantize",
    "run",
    "use_kernels",
]
