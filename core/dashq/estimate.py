"""Estimate the memory and the time of a run, from shapes and from how fast this machine multiplies."""

import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dashq.calibration.experts import POOLED_TOKENS
from dashq.calibration.paused import passes_pause, paused_bytes
from dashq.calibration.shares import TOKENS_PER_BATCH, Shares
from dashq.calibration.strips import solvers_of, strips_of
from dashq.calibration.tokens import HELD_OUT_TOKENS, TUNER_HELD_OUT_TOKENS
from dashq.curvature import Coupled
from dashq.measuring.continuation import LARGEST, whole_bytes
from dashq.measuring.predictions import TOKENS_PER_PIECE as JUDGED_TOGETHER
from dashq.model.decoder import Model
from dashq.model.transformers_internals import tied_weights
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Calibration, Recipe
from dashq.solving.compiled import compiling_pays
from dashq.strategies import Router, Tuner
from dashq.tuning.loop import TOKENS_PER_PIECE, checks_of
from dashq.tuning.planned import keeps_all, kept_bytes, optimizer_for, planned_tunables

# Of all tokens through a block, some of them part of the way; with paused passes one of each stream is enough.
PASSES = {"original": 1, "quantized": 2, "sequential": 3}
# Beside a block's products with its weights: attention runs at a third of their speed, and what is done to each number
# that a layer is given (norms, rotations, activations, sums) takes as long as so many operations of a product.
ATTENTION, ELEMENTWISE = 3, 400
# Operations for each number of an estimator's state and each token: products of pairs are symmetric, and some layers
# share their inputs. The products with the original's inputs are not symmetric.
FOLD, SHIFT = 0.75, 1.5
JUDGED = 130  # nanoseconds for each logit of the two models that are compared at the end
STARTED = 200e6  # bytes that the first pass through a block leaves behind: kernels, buffers, modules
MATRICES = 6  # as large as a full curvature, itself among them, in memory where a layer is corrected and solved by it
PROBE = 768  # columns and rows of the product that is timed

# Seconds on one core of a server's CPU, fitted to runs: around the work of a run, imports included, to load the kernels
# that an earlier run compiled, for each layer, and for each group that is certified.
START, KERNELS, LAYER, CERTIFY = 8.0, 2.5, 5e-3, 2e-3
# Nanoseconds to read one weight of a block, and to solve one with uncompiled arithmetic, as in small layers.
READ, EAGER = 10, 1000
TAKE = 2  # nanoseconds for a byte of sums, which is read twice: once to know that it is as it was written

# Of a tuner: operations for each weight and token of a step, two each for the pass forward, for its repetition on the
# way back unless it is kept, for the gradient by inputs and for that by weights; the same for the head, which gives the
# original's logits too and whose weights stay. Numbers of four bytes for each that it changes: the change, its
# gradient, two of the optimizer, the best so far. And for each logit of a piece: of both models, their softmaxes, and
# two gradients.
STEP, KEPT_STEP, HEAD, FORWARD, CHANGED, LOGITS = 8, 6, 6, 2, 5, 6


@dataclass(frozen=True)
class TuningEstimate:
    """The share of a tuner in a run: bytes of memory while it works, seconds, and the tokens that it learns from."""

    memory: float
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Pausing:
    """The passes of a run whose layers are solved in turn: what they hold in bytes where they pause, if there is room.

    Without it a block is passed anew before each stage.
    """

    memory: float
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """Peak memory in bytes beyond the interpreter, run time in seconds, bytes of what is not quantized.

    Memory and time are those of the run with its tuner, where it has one.
    """

    memory: float
    seconds: float
    other_bytes: int
    pausing: Pausing | None = None
    tuning: TuningEstimate | None = None


def estimate(
    model: Model, plans: Sequence[LayerPlan], recipe: Recipe, processes: int = 1, taken: int | None = None
) -> Estimate:
    """Rough figures, good to a factor of one and a half: one matrix product is timed, nothing is read.

    Among several processes they are those of the first one, which has most to do: it alone writes. Times of sending are
    not among them. Where `taken` bytes of sums are read, no sample passes any block.
    """
    tied = tied_weights(model.network)
    parameters = {name: p for name, p in model.network.named_parameters() if name not in tied}
    in_files = sum(p.numel() * p.element_size() for p in parameters.values())
    planned = sum(plan.layer.weights for plan in plans) * model.network.dtype.itemsize
    blocks = {block: sum(p.numel() for p in model.network.get_submodule(block).parameters()) for block in model.blocks}
    outside = sum(p.numel() for p in parameters.values()) - sum(blocks.values())
    walking = _memory(model, plans, recipe, (max(blocks.values()), outside), processes)
    memory = max(walking, _memory_of_judgement(model))
    reading, calibrating = _calibrating(model, plans, recipe, sum(blocks.values()))
    share = -(-Shares.of(plans, recipe.calibration).count // processes) / Shares.of(plans, recipe.calibration).count
    if taken is not None:
        calibrating = 1e-9 * TAKE * taken
    seconds = START + reading + share * calibrating + _solving(plans, recipe, processes)
    judged = _longest(HELD_OUT_TOKENS, JUDGED_TOGETHER, processes)
    seconds += 1e-9 * JUDGED * judged * model.network.config.get_text_config().vocab_size
    paused = None
    if recipe.calibration.propagate == "sequential":
        held = paused_bytes(model, plans, recipe.calibration)
        paused = Pausing(held, passes_pause(model, plans, recipe.calibration))
    if recipe.tuner is None:
        return Estimate(memory, seconds, in_files - planned, paused)
    lessons = _lesson_bytes(model, recipe.tuner)
    tuning = TuningEstimate(
        memory=lessons + _tuning_memory(model, plans, recipe.tuner, (max(blocks.values()), outside), processes),
        seconds=_tuning(model, plans, recipe.tuner, sum(blocks.values()) - _idle(model), processes),
        tokens=recipe.tuner.samples * recipe.tuner.sequence_length,
    )
    return Estimate(max(memory + lessons, tuning.memory), seconds + tuning.seconds, in_files - planned, paused, tuning)


def _memory(
    model: Model, plans: Sequence[LayerPlan], recipe: Recipe, weights: tuple[int, int], processes: int
) -> float:
    """Peak memory in bytes of one process; `weights` are those of the largest block and outside of all blocks.

    Alone, a process adds each share's states to those before it; of several each keeps its shares', and takes in one.
    """
    text, (block, outside) = recipe.calibration, weights
    states = 2 if processes == 1 else 1 + -(-Shares.of(plans, text).count // processes)
    width = max(plan.layer.columns for plan in plans)
    streams = 2 if text.corrects else 1  # the original model's beside the quantized one's
    blocks: dict[str, list[LayerPlan]] = defaultdict(list)
    for plan in plans:
        blocks[plan.layer.block].append(plan)
    curvature = max((_memory_of_curvature(own, text, states) for own in blocks.values()), default=0)
    own_samples = -(-text.samples // processes)
    activations: int = streams * own_samples * text.sequence_length * model.network.config.get_text_config().hidden_size
    in_type = outside + (1 + streams) * block + activations + 8 * TOKENS_PER_BATCH * width
    solving = max(_memory_to_solve(plan, text) for plan in plans)
    paused = paused_bytes(model, plans, text) / processes if passes_pause(model, plans, text) else 0
    return STARTED + model.dtype.itemsize * in_type + curvature + solving + paused


def _memory_of_curvature(plans: Sequence[LayerPlan], text: Calibration, states: int) -> int:
    """Bytes of what is learned of one block's layers: while samples pass, and while layers are solved by it.

    Each process keeps so many states of every layer, and forms one more of one where it adds two. Where layers are
    solved in turn those of one stage are there, which share their inputs.
    """
    dense, experts = [0], [0]
    for plan in plans:
        columns = plan.layer.columns
        state = 4 * plan.scheme.estimator.state_size(columns)
        if plan.layer.expert is not None:
            experts.append(state)
        else:  # inputs are compared in a matrix of all columns
            dense.append(state + 4 * text.corrects * columns**2)
    held = (max(dense) if text.propagate == "sequential" else sum(dense)) + sum(experts)
    largest = max(*dense, *experts)
    coupled = [plan.layer.columns for plan in plans if issubclass(plan.scheme.solver.needs, Coupled)]
    return max(states * held + largest, held - largest + 4 * MATRICES * max(coupled, default=0) ** 2)


def _memory_to_solve(plan: LayerPlan, text: Calibration) -> int:
    """Bytes of a layer's weights and codes, and of what its solver and its judgement hold beside one of its strips.

    Where weights are corrected they are there twice.
    """
    strip: int = max(rows.stop - rows.start for rows in strips_of(plan)) * plan.layer.columns
    return 16 * strip + 6 * (plan.layer.weights - strip) + 4 * text.corrects * plan.layer.weights


def _memory_of_judgement(model: Model) -> float:
    """Peak memory in bytes where the judgement opens the whole model, which it does with small ones alone."""
    whole = whole_bytes(model)
    return STARTED + whole if whole <= LARGEST else 0.0


def _calibrating(model: Model, plans: Sequence[LayerPlan], recipe: Recipe, weights: int) -> tuple[float, float]:
    """Seconds to read blocks of `weights` in all; and to send the tokens through them, and to fold layers' inputs.

    A block's own pass takes a token to the experts that it chooses. A second pass takes to each expert the tokens that
    count for it, and the first `POOLED_TOKENS` tokens.
    """
    text = recipe.calibration
    tokens, streams = text.samples * text.sequence_length, 2 if text.corrects else 1
    count, chosen = _experts(model)
    routers = {plan.rule: plan.scheme.router for plan in plans if plan.layer.expert is not None}
    shares = {rule: _share(router, count, chosen) for rule, router in routers.items() if router}
    second_pass = folds = 0.0
    for plan in plans:
        folded = _folded_tokens(plan, tokens, shares)
        if plan.layer.expert is not None:
            second_pass += folded * plan.layer.weights
        folds += folded * plan.scheme.estimator.state_size(plan.layer.columns)
    passes = streams * (1 if passes_pause(model, plans, text) else PASSES[text.propagate])
    operations = 2 * tokens * passes * (weights - _idle(model)) + 2 * second_pass
    operations += tokens * passes * _besides(model, plans, text.sequence_length)
    return (
        1e-9 * READ * weights,
        operations / _products_per_second(model, model.dtype)
        + (FOLD + SHIFT * text.corrects) * folds / _products_per_second(model, torch.float32),
    )


def _besides(model: Model, plans: Sequence[LayerPlan], length: int) -> float:
    """Operations for a token in samples of this length, in all blocks, besides products with weights."""
    width: int = model.network.config.get_text_config().hidden_size
    columns = sum(plan.layer.columns for plan in plans if plan.layer.expert is None)
    return ATTENTION * 4 * length * width * len(model.blocks) + ELEMENTWISE * columns


def _experts(model: Model) -> tuple[int, int]:
    """The number of experts, and of those that a token chooses; 1 of 1 outside of mixtures."""
    count = 1 + max((layer.expert or 0 for layer in model.layers()), default=0)
    return count, min(count, getattr(model.network.config.get_text_config(), "num_experts_per_tok", None) or 1)


def _idle(model: Model) -> float:
    """The weights of experts that a token does not choose."""
    count, chosen = _experts(model)
    return (1 - chosen / count) * sum(layer.weights for layer in model.layers() if layer.expert is not None)


def _lesson_bytes(model: Model, tuner: Tuner) -> float:
    """The original's hidden states for the text of a tuner, which go along with the walk."""
    tokens = tuner.samples * tuner.sequence_length + max(TUNER_HELD_OUT_TOKENS, tuner.sequence_length)
    return float(tokens * model.network.config.get_text_config().hidden_size * model.dtype.itemsize)


def _tuning_memory(
    model: Model, plans: Sequence[LayerPlan], tuner: Tuner, weights: tuple[int, int], processes: int
) -> float:
    """Memory in bytes of the tuner's steps besides its text; `weights` as for the walk.

    Of several processes all but the first keep the packed layers, and have no optimizer.
    """
    _, changed = optimizer_for(tuner, planned_tunables(model, [plan.stored for plan in plans]))
    copies = CHANGED + (tuner.batch > 1)  # the sum of the samples' gradients beside those of one
    numbers = copies * sum(tunable.parameter.numel() for tunable in changed)
    config, (block, outside) = model.network.config.get_text_config(), weights
    borders = tuner.sequence_length * config.hidden_size * len(model.blocks)
    inside = 8 * tuner.sequence_length * max(plan.layer.columns for plan in plans)
    in_type: int = outside + 2 * block + borders + inside  # the block's weights and their gradients
    logits: int = LOGITS * TOKENS_PER_PIECE * config.vocab_size
    layers = [plan.stored for plan in plans]
    kept = kept_bytes(model, layers, tuner) if keeps_all(model, layers, tuner, processes) else 0
    packed = sum(plan.bytes for plan in plans) if processes > 1 else 0
    return STARTED + model.dtype.itemsize * in_type + 4 * (numbers + logits) + kept + packed


def _tuning(model: Model, plans: Sequence[LayerPlan], tuner: Tuner, weights: float, processes: int) -> float:
    """Seconds of the original's pass over the tuner's text, the steps, and the checks; `weights` meet each token.

    Processes share the text's batches, the samples of each step and the pieces of each check.
    """
    config = model.network.config.get_text_config()
    head: int = config.hidden_size * config.vocab_size
    tokens = tuner.samples * tuner.sequence_length
    held_out = max(TUNER_HELD_OUT_TOKENS, tuner.sequence_length)
    original = FORWARD * weights * _longest(tokens + held_out, TOKENS_PER_BATCH, processes)
    step = KEPT_STEP if keeps_all(model, [plan.stored for plan in plans], tuner, processes) else STEP
    steps = tuner.epochs * tokens * _longest(tuner.batch, 1, processes) / tuner.batch * (step * weights + HEAD * head)
    checked = _longest(held_out, tuner.sequence_length, processes)
    checks = (checks_of(tuner, held_out) + 1) * checked * FORWARD * (weights + 2 * head)
    return (original + steps + checks) / _products_per_second(model, model.dtype)


def _longest(work: int, piece: int, processes: int) -> int:
    """The most of a work that one of so many processes does, where pieces of it are dealt out in turn."""
    return min(work, piece * -(-work // (piece * processes)))


def _folded_tokens(plan: LayerPlan, tokens: int, shares: Mapping[str, float]) -> float:
    """The number of tokens that are folded for a layer: all, or those that count for its expert and those pooled."""
    return tokens if plan.layer.expert is None else tokens * shares[plan.rule] + min(tokens, POOLED_TOKENS)


def _share(router: Router, count: int, chosen: int) -> float:
    """The share of tokens that count for an expert where each chooses `chosen` of `count`, all equally often."""
    token, expert = torch.arange(count)[:, None], torch.arange(count)
    probabilities = torch.full((count, count), 1 / count)
    return float((router.token_weights(probabilities, (expert - token) % count < chosen) > 0).float().mean())


def _solving(plans: Sequence[LayerPlan], recipe: Recipe, processes: int) -> float:
    """Seconds to solve, judge and pack all layers.

    Processes share the strips of a block's layers; where they are solved in turn, those that have as many inputs.
    """
    in_turn = recipe.calibration.propagate == "sequential"
    together: dict[Hashable, list[LayerPlan]] = defaultdict(list)
    for plan in plans:
        in_order = in_turn and plan.layer.expert is None
        together[plan.layer.block, plan.layer.columns if in_order else None].append(plan)
    longest = 0.0
    for stage in together.values():
        loads, solvers = [0.0] * processes, solvers_of(stage, processes)
        for plan in stage:
            strips = solvers[plan.layer.name]
            for process in strips:
                loads[process] += plan.layer.weights * _nanoseconds_per_weight(plan) / len(strips)
        longest += max(loads)
    compiled = [plan for plan in plans if compiling_pays(plan.layer.weights)]
    certified = recipe.certificate_groups * sum(plan.scheme.solver.objective == "groups" for plan in plans) / len(plans)
    return (KERNELS if compiled else 0) + LAYER * len(plans) + 1e-9 * longest + CERTIFY * certified


def _nanoseconds_per_weight(plan: LayerPlan) -> float:
    compiled = plan.scheme.solver.nanoseconds(plan.layer, plan.size, plan.grid)
    return compiled if compiling_pays(plan.layer.weights) else max(EAGER, compiled)


def _products_per_second(model: Model, dtype: torch.dtype) -> float:
    """Operations, two for each multiplication and addition, of the fastest of three timed matrix products."""
    x = torch.ones(2048, PROBE, device=model.device, dtype=dtype)
    w = torch.ones(PROBE, PROBE, device=model.device, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        float((x @ w).sum())
        seconds.append(time.perf_counter() - start)
    return 2 * 2048 * PROBE * PROBE / min(seconds)
