"""Recipes for the programs that people use results in, from a model and how many bits it may have."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import yaml

from dashq import Layer, Serializer, Target, UsageError, Wish, hookimpl

SEEN = """
  propagate: sequential     # every layer sees what the quantized layers before it feed it,
  error_correction: 0.5     # and undoes half of what they change"""
DIAGONAL = """
  estimator: diagonal       # how much each column of inputs matters"""
FULL = """
  estimator: hybrid         # how columns of inputs go together, shrunk by as much as it is noise
  solver: feedback          # columns make up for each other's errors"""
ROUTER = """
  router: blended           # for an expert, tokens that it was chosen for count fully, all others a little"""
TUNER = """
tuner: {name: distill}      # trains: scales, offsets and norms learn from the original model, codes stay
"""
SUPER_BLOCK, BLOCK = 256, 32  # columns, for llama.cpp
OVERRIDES = "\noverrides:\n"
KEPT = "kv_b_proj"  # of latent attention
# Layers whose columns are of heads that llama.cpp has in another order in some models: super-blocks hold two of them.
OF_HEADS = "linear_attn.out_proj"


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format whose groups can have several sizes: its entry in a recipe, and what it can hold.

    `overhead` says how many bits scale and zero of a group take, at some bits of its codes; each column of a layer
    takes `per_column` besides. Where it `mixes`, layers can differ; where it `holds_experts`, they can be those of a
    mixture; where it `holds_outside`, embeddings and head.
    """

    entry: str
    bits: Sequence[int]
    sizes: Sequence[int]
    overhead: Callable[[int], int]
    mixes: bool
    holds_experts: bool = False
    holds_outside: bool = False
    per_column: int = 0

    def average(self, layers: Sequence[Layer], bits: int, size: int) -> float:
        """The bits of a weight with all that belongs to it, in groups of `size` or the next divisor below."""
        total = sum(
            layer.weights * bits
            + layer.weights // _divisor(layer.columns, size) * self.overhead(bits)
            + layer.columns * self.per_column
            for layer in layers
        )
        return total / sum(layer.weights for layer in layers)


def _two_halves(bits: int) -> int:
    return 32


def _half_and_code(bits: int) -> int:
    return 16 + bits


NATIVE = Format(
    entry="dashq",
    bits=range(1, 9),
    sizes=(32, 64, 128, 256),
    overhead=_two_halves,
    mixes=True,
    holds_experts=True,
    holds_outside=True,
)
MLX = Format(
    entry="mlx",
    bits=(2, 3, 4, 5, 6, 8),
    sizes=(32, 64, 128),
    overhead=_two_halves,
    mixes=True,
    holds_experts=True,
    holds_outside=True,
)
METAL = Format(entry="metal", bits=(2, 4, 8), sizes=(32, 64, 128), overhead=_two_halves, mixes=False)
INTEGER = Format(
    entry="{name: compressed-tensors, zero: integer}",
    bits=(2, 3, 4, 8),
    sizes=(32, 64, 128),
    overhead=_half_and_code,
    mixes=False,
)
GPTQ = Format(entry="gptq", bits=(2, 3, 4, 8), sizes=(32, 64, 128), overhead=_half_and_code, mixes=False, per_column=32)


@dataclass(frozen=True)
class Type:
    """One of llama.cpp's types: the size of its groups, and the bits of a weight with all that belongs to it.

    Recipes name it unless it is the format's `usual` one at its bits; `solver` is one for a diagonal curvature.
    """

    name: str
    bits: int
    size: int
    weight: float
    solver: str = "closed_form"
    usual: bool = True

    @property
    def key(self) -> str:
        """The line of a scheme that names it, indented; empty for a usual one."""
        return "" if self.usual else f"\n  type: {self.name}"


SUPER_BLOCKS = (
    Type("Q2_K", 2, 16, 2.625, "k_quant"),
    Type("Q3_K", 3, 16, 3.4375, "k_quant"),
    Type("Q4_K", 4, 32, 4.5, "k_quant"),
    Type("Q6_K", 6, 16, 6.5625, "k_quant"),
)
# Types of the same bits that come nearer to the weights, and take longer to solve.
CODEBOOKS = (
    Type("IQ2_S", 2, 16, 2.5625, "k_quant", usual=False),
    Type("IQ3_S", 3, 32, 3.4375, "k_quant", usual=False),
)
# For any multiple of 32 columns; of those of 4 bits the first is nearer to the weights in its bytes.
PLAIN_BLOCKS = (
    Type("IQ4_NL", 4, 32, 4.5, "k_quant", usual=False),
    Type("Q4_1", 4, 32, 5.0, usual=False),
    Type("Q5_1", 5, 32, 6.0),
    Type("Q8_0", 8, 32, 8.5),
)
# What a budget chooses among, by what a weight takes: where columns are multiples of 256, and elsewhere.
WIDE = (*CODEBOOKS, SUPER_BLOCKS[2], Type("Q5_K", 5, 32, 5.5), SUPER_BLOCKS[3], PLAIN_BLOCKS[3])
NARROW = (*PLAIN_BLOCKS[:2], Type("Q5_0", 5, 32, 5.5), *PLAIN_BLOCKS[2:])


def recipe_in_groups(formats: Sequence[Format], wish: Wish) -> str:
    """A recipe with groups of the size that suits the wish, in the first of the formats that holds it."""
    if any(layer.expert is not None for layer in wish.layers) and not any(form.holds_experts for form in formats):
        raise UsageError(
            f"this model is a mixture of experts, which this program's formats cannot hold as dashq quantizes them; "
            f"mixtures are possible for {', '.join(FOR_MIXTURES)}"
        )
    every = [
        (form, bits, size) for form in formats for bits in form.bits for size in _dividing(form.sizes, wish.layers)
    ]
    if wish.bits.is_integer():
        choices = [choice for choice in every if choice[1] == wish.bits]
        choices = sorted(choices, key=lambda choice: (formats.index(choice[0]), abs(choice[2] - 64)))[:1]
    else:
        choices = [choice for choice in every if choice[0].average(wish.layers, *choice[1:]) <= wish.bits]
    if not choices:
        whole = sorted({bits for _, bits, _ in every})
        least = min(form.average(wish.layers, bits, size) for form, bits, size in every)
        raise UsageError(
            f"bits should be one of {', '.join(map(str, whole))}, or at least {least:.4g} on average, not {wish.bits:g}"
        )
    form, bits, size = max(choices, key=lambda choice: choice[0].average(wish.layers, *choice[1:]))
    uneven = "" if all(layer.columns % size == 0 for layer in wish.layers) else ", uneven: divisor"
    weight = form.average(wish.layers, bits, size)
    scheme = _scheme(wish, bits, f"{size}{uneven}", f"{weight:.4g} bits per weight")
    average = weight if wish.bits.is_integer() else wish.bits
    budget = _budget(form, bits, average) if form.mixes and wish.level == "best" else ""
    outside = ""
    if form.holds_outside:
        more = next((own for own in form.bits if own >= bits_outside(bits)), form.bits[-1])
        for layers in _outside(wish):
            outside += _entry(layers, more, max(_dividing(form.sizes, layers)), "closed_form")
    return _recipe(wish, scheme, budget + outside, form.entry)


def recipe_in_blocks(modelfile: bool, wish: Wish) -> str:
    """A recipe with super-blocks where the columns of layers allow them, and plain blocks elsewhere.

    With `modelfile` the result has one for Ollama.
    """
    fits = any(layer.columns % BLOCK == 0 for layer in wish.layers)  # else all are refused, and told why
    unfit = {_last_name(layer) for layer in wish.layers if fits and layer.columns % BLOCK}
    layers = [layer for layer in wish.layers if _last_name(layer) not in {KEPT, *unfit}]
    keeps = any(_last_name(layer) == KEPT for layer in wish.layers)
    wish = replace(wish, layers=layers)
    better = {kind.bits: kind for kind in CODEBOOKS} if wish.level == "best" else {}
    super_blocks = [better.get(kind.bits, kind) for kind in SUPER_BLOCKS]
    narrow = [layer for layer in wish.layers if _is_narrow(layer)]
    types = [*(super_blocks if len(narrow) < len(wish.layers) else ()), *PLAIN_BLOCKS]
    averages = {kind.name: _average_in_blocks(wish.layers, kind) for kind in types}
    kind = _type_of(types, averages, wish.bits)
    scheme = _scheme(
        wish,
        kind.bits,
        str(kind.size),
        f"{kind.name}, {averages[kind.name]:.4g} bits per weight in all",
        kind.solver,
        kind.key,
    )
    overrides = ""
    of_heads = [layer for layer in narrow if layer.columns % SUPER_BLOCK == 0]
    # A budget goes by how many columns layers have, and not by what these are of.
    decided = narrow and (kind not in PLAIN_BLOCKS or (of_heads and wish.level == "best"))
    other = _other(kind.bits) if decided else None
    if other:
        ends = "|".join(dict.fromkeys(_last_name(layer) for layer in narrow))
        why = "super-blocks do not fit" if of_heads else f"columns are no multiple of {SUPER_BLOCK}"
        overrides = f"""
overrides:                  # where {why}, {other.name}
  - match: '.*\\.({ends})(\\..*)?'
    bits: {other.bits}{other.key.replace("  type", "    type")}
    grouper: {{name: contiguous, size: 32}}
    solver: {other.solver if wish.level == "fast" else "feedback"}
"""
    if keeps:
        overrides += f"""{"" if overrides else OVERRIDES}\
  - match: '.*\\.{KEPT}'   # stays as it is: llama.cpp turns a part of it, so that its cache holds far less
    skip: true
"""
    if unfit:
        overrides += f"""{"" if overrides else OVERRIDES}\
  - match: '.*\\.({"|".join(sorted(unfit))})'   # columns are no multiple of {BLOCK}
    skip: true
"""
    if wish.level == "best":
        wanted = averages[kind.name] if wish.bits.is_integer() else wish.bits
        overrides += _budget_in_blocks(wish.layers, wanted, other)
    for layers in _outside(wish):
        wide = kind.bits <= 4 and all(layer.columns % SUPER_BLOCK == 0 for layer in layers)
        more = 6 if wide else 5 if kind.bits <= 3 else 8
        own = next(other for other in (SUPER_BLOCKS if wide else PLAIN_BLOCKS) if other.bits == more)
        overrides += _entry(layers, more, own.size, own.solver)
    return _recipe(wish, scheme, overrides, "{name: gguf, modelfile: true}" if modelfile else "gguf")


def bits_outside(bits: int) -> int:
    """The bits of embeddings and head: more than the blocks' own, which costs a small model's predictions little."""
    return min(8, max(5, bits + 2))


def _other(bits: int) -> Type:
    """The type of plain blocks where super-blocks of `bits` do not fit: the first of at least as many, from 4 on."""
    return next(kind for kind in PLAIN_BLOCKS if kind.bits >= bits)


def _is_narrow(layer: Layer) -> bool:
    """True where super-blocks do not fit."""
    return layer.columns % SUPER_BLOCK != 0 or layer.name.endswith(OF_HEADS)


def _average_in_blocks(layers: Sequence[Layer], kind: Type) -> float:
    """The bits of a weight where layers are of a type, or of a plain one where super-blocks do not fit."""
    plain = kind if kind in PLAIN_BLOCKS else _other(kind.bits)
    total = sum(layer.weights * (plain if _is_narrow(layer) else kind).weight for layer in layers)
    return total / sum(layer.weights for layer in layers)


def _budget_in_blocks(layers: Sequence[Layer], wanted: float, narrow: Type | None) -> str:
    """A budget of `wanted` bits of a weight on average, in which `narrow` is what narrow layers have, if it is decided.

    Offered are, for each width, the type that is no larger than there is room for, the next below and the next above.
    """
    free = [layer for layer in layers if not narrow or not _is_narrow(layer)]
    weights = sum(layer.weights for layer in free)
    taken = (sum(layer.weights for layer in layers) - weights) * (narrow.weight if narrow else 0)
    room = (wanted * sum(layer.weights for layer in layers) - taken) / weights
    pools: list[Sequence[Type]] = [WIDE] * any(not _is_narrow(layer) for layer in free)
    pools += [NARROW] * any(_is_narrow(layer) for layer in free)
    offered = list(dict.fromkeys(kind for pool in pools for kind in _near(pool, room)))
    if min(kind.weight for kind in offered) >= room:
        return (
            "\n# Without a budget: llama.cpp has no smaller type for these layers, which could give bits to others.\n"
        )
    groupers = ", ".join(f"{{name: contiguous, size: {size}}}" for size in sorted({kind.size for kind in offered}))
    return f"""
budget:                     # bits go where the model's predictions need them
  bits_per_weight: {wanted:g}
  bits: {sorted({kind.bits for kind in offered})}
  types: [{", ".join(kind.name for kind in offered)}]
  groupers: [{groupers}]
"""


def _near(kinds: Sequence[Type], room: float) -> Sequence[Type]:
    """Of types by their size the last that takes no more than there is room for, with its neighbours."""
    index = max((index for index, kind in enumerate(kinds) if kind.weight <= room), default=0)
    return kinds[max(0, index - 1) : index + 2]


def _type_of(types: Sequence[Type], averages: Mapping[str, float], wanted: float) -> Type:
    """The first type of the bits wanted, or that which takes most of those that take no more on average."""
    if wanted.is_integer():
        fitting = [kind for kind in types if kind.bits == wanted][:1]
    else:
        fitting = [kind for kind in types if averages[kind.name] <= wanted]
    if not fitting:
        ordered = sorted(types, key=lambda kind: (kind.bits, averages[kind.name]))
        listed = ", ".join(f"{kind.bits} ({kind.name}: {averages[kind.name]:.4g})" for kind in ordered)
        raise UsageError(
            f"for columns as this model has them, llama.cpp has types of these bits, each with what a weight takes on "
            f"average: {listed}; none for {wanted:g}"
        )
    return max(fitting, key=lambda kind: averages[kind.name])


def _divisor(columns: int, size: int) -> int:
    """The largest divisor of the columns that is no larger than a size."""
    return next(number for number in range(min(size, columns), 0, -1) if columns % number == 0)


def _dividing(sizes: Sequence[int], layers: Sequence[Layer]) -> Sequence[int]:
    """The sizes that divide the columns of all layers; 64 where none does."""
    return [size for size in sizes if all(layer.columns % size == 0 for layer in layers)] or [64]


def _last_name(layer: Layer) -> str:
    """The last part of a layer's name that is no number of an expert."""
    return next(part for part in reversed(layer.name.split(".")) if not part.isdecimal())


def _scheme(
    wish: Wish, bits: int, size: str, comment: str, diagonal_solver: str = "closed_form", kind: str = ""
) -> str:
    """The scheme of all layers, with one solver for a diagonal curvature and one for a full one, and a type's key."""
    diagonal = f"{DIAGONAL}\n  solver: {diagonal_solver}"
    router = ROUTER if any(layer.expert is not None for layer in wish.layers) else ""
    return f"""\
scheme:
  bits: {bits}{kind}{diagonal if wish.level == "fast" else FULL}
  grouper: {{name: contiguous, size: {size}}}   # columns with one scale: {comment}{router}
"""


def _outside(wish: Wish) -> list[list[Layer]]:
    """The layers outside of the blocks by their entry: one for embeddings, those of each block among them."""
    heads = [layer for layer in wish.outside if layer.role == "head"]
    return [own for own in ([layer for layer in wish.outside if layer.role != "head"], heads) if own]


def _entry(layers: Sequence[Layer], bits: int, size: int, solver: str) -> str:
    """The entry for embeddings or head; one matrix that is both has that of embeddings."""
    what = {
        "embeddings": "rows that are looked up",
        "head": "it predicts tokens",
        "tied": "the head is the same matrix",
    }
    first = layers[0]
    key = "head" if first.role == "head" else "embeddings"
    uneven = "" if all(layer.columns % size == 0 for layer in layers) else ", uneven: divisor"
    return f"""
{f"{key}:":<27} # {what[first.role]}
  bits: {bits}                   # more than in the blocks; without this entry they stay as they are
  estimator: diagonal
  grouper: {{name: contiguous, size: {size}{uneven}}}
  solver: {solver}
"""


def _budget(form: Format, bits: int, average: float) -> str:
    groupers = ", ".join(f"{{name: contiguous, size: {size}}}" for size in form.sizes if size >= 64)
    possible = [other for other in form.bits if other in (bits, bits + 1)]
    return f"""
budget:                     # bits go where the model's predictions need them
  bits_per_weight: {average:g}
  bits: {possible}
  groupers: [{groupers}]
"""


def _recipe(wish: Wish, scheme: str, more: str, serializer: str) -> str:
    return f"""\
# {wish.bits:g} bits, {wish.level} quality. `dashq plan` shows what this does to every layer.
model: {_value(wish.model)}
output: {_value(str(wish.output))}

calibration:
  dataset: {_value(wish.text)}   # a name on the hub, or your own .txt, .jsonl, .json or .parquet file
  samples: 16
  sequence_length: {wish.sequence_length}{"" if wish.level == "fast" else SEEN}

{scheme}{more}{TUNER if wish.level == "best" else ""}
serializer: {serializer}
"""


def _value(text: str) -> str:
    """A text as YAML has it, in quotes where it needs them."""
    try:
        return text if yaml.safe_load(text) == text else json.dumps(text)
    except yaml.YAMLError:
        return json.dumps(text)


FOR_MIXTURES = ("dashq", "mlx", "llama.cpp", "ollama")  # a test compares them with what the formats refuse
_ANSWER = "transformers.pipeline('text-generation', sys.argv[1])('The capital of France is')[0]['generated_text']"
_GROUPS = {"dashq": (NATIVE,), "transformers": (METAL, INTEGER), "mlx": (MLX,), "vllm": (GPTQ,)}
_FORMATS = {
    "dashq": ("dashq",),
    "transformers": ("metal", "compressed-tensors"),
    "mlx": ("mlx",),
    "vllm": ("gptq", "compressed-tensors"),
    "llama.cpp": ("gguf",),
    "ollama": ("gguf",),
}
_COMMANDS = {
    "dashq": "dashq chat {output}",
    "transformers": f'python -c "import sys, transformers; print({_ANSWER})" {{output}}',
    "mlx": "mlx_lm.generate --model {output} --prompt 'The capital of France is'",
    "vllm": "vllm serve {output}",
    "llama.cpp": "llama-cli -m {output}/model.gguf -p 'The capital of France is'",
    "ollama": "ollama create my-model -f {output}/Modelfile && ollama run my-model",
}


def suits(name: str, serializer: Serializer) -> bool:
    """True where results are made for the program of that name; with a Modelfile beside them they are for Ollama."""
    has_modelfile = getattr(serializer, "modelfile", False)
    return serializer.name in _FORMATS[name] and has_modelfile == (name == "ollama")


TARGETS = tuple(
    Target(
        name=name,
        recipe=partial(recipe_in_groups, _GROUPS[name])
        if name in _GROUPS
        else partial(recipe_in_blocks, name == "ollama"),
        suits=partial(suits, name),
        command=command,
    )
    for name, command in _COMMANDS.items()
)


@hookimpl
def dashq_targets() -> tuple[Target, ...]:
    return TARGETS
