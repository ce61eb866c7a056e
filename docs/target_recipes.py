"""The ready recipes: for each program and each current family what `dashq init` writes, from the models' sizes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dashq import Layer, Role, Wish, load_registry
from dashq.starting import SEQUENCE_LENGTH, TEXT, usual_output

BITS = {"dashq": 2, "transformers": 4, "mlx": 3, "vllm": 4, "llama.cpp": 3, "ollama": 3}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model on the hub that stands for its family: outputs × inputs of a block's layers, and how many experts.

    Layers of an expert have `{}` in the place of its number. It knows so many `words`; where it is `tied` embeddings
    and head are one matrix. `not_for` are programs whose formats do not hold it.
    """

    title: str
    model: str
    shapes: Mapping[str, tuple[int, int]]
    words: int
    tied: bool = False
    experts: int = 0
    not_for: tuple[str, ...] = ()

    def layers(self) -> Iterator[Layer]:
        """The layers of one block, which all blocks are like."""
        for name, (rows, columns) in self.shapes.items():
            whole = f"model.layers.0.{name}"
            if "{}" not in name:
                yield Layer(name=whole, rows=rows, columns=columns)
            else:
                for expert in range(self.experts):
                    yield Layer(name=whole.format(expert), rows=rows, columns=columns, expert=expert)

    def outside(self) -> list[Layer]:
        """Embeddings and head, or the one matrix that is both."""
        hidden, _ = self.shapes["self_attn.o_proj"]
        names: dict[Role, str] = {"embeddings": "model.embed_tokens", "head": "lm_head"}
        if self.tied:
            names = {"tied": "model.embed_tokens"}
        return [Layer(name=name, rows=self.words, columns=hidden, role=role) for role, name in names.items()]


def _dense(hidden: int, queries: int, keys: int, inner: int) -> dict[str, tuple[int, int]]:
    return _attention(hidden, queries, keys) | {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def _attention(hidden: int, queries: int, keys: int) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }


FAMILIES = {
    "llama3": Family(
        title="Llama 3", model="meta-llama/Llama-3.1-8B-Instruct", shapes=_dense(4096, 4096, 1024, 14336), words=128256
    ),
    "qwen3": Family(title="Qwen3", model="Qwen/Qwen3-8B", shapes=_dense(4096, 4096, 1024, 12288), words=151936),
    "gemma3": Family(
        title="Gemma 3", model="google/gemma-3-1b-it", shapes=_dense(1152, 1024, 256, 6912), words=262144, tied=True
    ),
    "mistral": Family(
        title="Mistral", model="mistralai/Mistral-7B-Instruct-v0.3", shapes=_dense(4096, 4096, 1024, 14336), words=32768
    ),
    "phi4": Family(
        title="Phi",
        model="microsoft/Phi-4-mini-instruct",
        shapes={
            "self_attn.qkv_proj": (5120, 3072),
            "self_attn.o_proj": (3072, 3072),
            "mlp.gate_up_proj": (16384, 3072),
            "mlp.down_proj": (3072, 8192),
        },
        words=200064,
        tied=True,
    ),
    "qwen3_moe": Family(
        title="mixture",
        model="Qwen/Qwen3-30B-A3B",
        shapes=_attention(2048, 4096, 512)
        | {"mlp.experts.gate_up_proj.{}": (1536, 2048), "mlp.experts.down_proj.{}": (2048, 768)},
        words=151936,
        experts=128,
        not_for=("transformers", "vllm"),
    ),
}


def target_recipes(folder: Path) -> dict[Path, str]:
    """The text of every ready recipe by its path in a folder of recipes."""
    targets = load_registry().targets
    return {
        folder
        / program
        / f"{name}.yaml": f"{_head(family, program)}\n{targets[program].recipe(_wish(family, program))}"
        for program in BITS
        for name, family in FAMILIES.items()
        if program not in family.not_for
    }


def target_table() -> str:
    """The programs, each with its ready recipes."""
    heads = ["in `recipes`", *(f"{family.title}: `{name}.yaml`" for name, family in FAMILIES.items())]
    rows = [
        [f"`{program}`, {bits} bits", *("–" if program in family.not_for else "yes" for family in FAMILIES.values())]
        for program, bits in BITS.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


def _head(family: Family, program: str) -> str:
    name = family.model.rpartition("/")[2]
    return (
        "# yaml-language-server: $schema=../schema.json\n"
        f"# {name} for {program}: dashq init {family.model} --bits {BITS[program]} --for {program}"
    )


def _wish(family: Family, program: str) -> Wish:
    bits = BITS[program]
    return Wish(
        model=family.model,
        output=usual_output(family.model, bits),
        bits=float(bits),
        level="usual",
        text=TEXT,
        sequence_length=SEQUENCE_LENGTH,
        layers=list(family.layers()),
        outside=family.outside(),
    )
