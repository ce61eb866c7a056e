"""The toolkit of solver authors: arithmetic on the numbers that a file can hold."""

from dashq.solving.alternation import Descent, alternate, residual_floor
from dashq.solving.arithmetic import (
    encode,
    group_importance,
    groups_without_importance,
    minmax_parameters,
    quantized,
    round_to_nearest,
    weighted_error,
)
from dashq.solving.certificate import Certificate, certify
from dashq.solving.compiled import Compilable, compiling_pays, materialize
from dashq.solving.least_squares import Fit, Moments, clip, fit, moments
from dashq.solving.optimum import Optimum, events, find_optimum
from dashq.solving.patterns import nearest_levels, nearest_of, nearest_patterns
from dashq.solving.pieces import Norm, Piece, PieceTensors, ScaleAndOffset, solve_in_pieces
from dashq.solving.search import search_scales
from dashq.solving.stored_values import Levels, spread, store
from dashq.solving.super_blocks import SMALLEST_UNIT, as_unit, factor, on_unit

__all__ = [
    "SMALLEST_UNIT",
    "Certificate",
    "Compilable",
    "Descent",
    "Fit",
    "Levels",
    "Moments",
    "Norm",
    "Optimum",
    "Piece",
    "PieceTensors",
    "ScaleAndOffset",
    "alternate",
    "as_unit",
    "certify",
    "clip",
    "compiling_pays",
    "encode",
    "events",
    "factor",
    "find_optimum",
    "fit",
    "group_importance",
    "groups_without_importance",
    "materialize",
    "minmax_parameters",
    "moments",
    "nearest_levels",
    "nearest_of",
    "nearest_patterns",
    "on_unit",
    "quantized",
    "residual_floor",
    "round_to_nearest",
    "search_scales",
    "solve_in_pieces",
    "spread",
    "store",
    "weighted_error",
]
