"""Results for tests to share: one model in every format."""

from pathlib import Path
from typing import Any

import torch

from dashq import run
from once import written_once
from pico import WIDE, pico_model
from recipes import build_recipe, small_scheme

# The serializer, bits, group size and solver of each result.
SCHEMES: dict[str, tuple[Any, int, int, str]] = {
    "dashq": ("dashq", 3, 64, "irls"),
    "mlx": ("mlx", 3, 64, "irls"),
    "metal": ("metal", 2, 64, "irls"),
    "compressed-tensors": ("compressed-tensors", 3, 64, "irls"),
    "compressed-tensors-integer": ({"name": "compressed-tensors", "zero": "integer"}, 4, 32, "irls"),
    "gptq": ("gptq", 3, 64, "irls"),
    "gptq-v1": ({"name": "gptq", "version": 1, "zero": "symmetric"}, 4, 64, "irls"),
    "dashq-packed-linear": ("dashq-packed-linear", 3, 64, "irls"),
    "Q2_K": ("gguf", 2, 16, "k_quant"),
    "Q3_K": ("gguf", 3, 16, "k_quant"),
    "Q4_K": ("gguf", 4, 32, "k_quant"),
    "Q4_1": ({"name": "gguf", "four_bits": "Q4_1"}, 4, 32, "irls"),
    "Q5_1": ("gguf", 5, 32, "irls"),
    "Q5_K": ({"name": "gguf", "five_bits": "Q5_K"}, 5, 32, "k_quant"),
    "Q6_K": ("gguf", 6, 16, "k_quant"),
    "Q4_0": ({"name": "gguf", "four_bits": "Q4_0"}, 4, 32, "irls"),
    "Q5_0": ({"name": "gguf", "five_bits": "Q5_0"}, 5, 32, "irls"),
    "Q8_0": ("gguf", 8, 32, "irls"),
    "IQ2_S": ({"name": "gguf", "two_bits": "IQ2_S"}, 2, 16, "k_quant"),
    "IQ3_S": ({"name": "gguf", "three_bits": "IQ3_S"}, 3, 32, "k_quant"),
    "IQ4_XS": ({"name": "gguf", "four_bits": "IQ4_XS"}, 4, 32, "k_quant"),
    "IQ4_NL": ({"name": "gguf", "four_bits": "IQ4_NL"}, 4, 32, "k_quant"),
}
# Formats whose programs keep the experts of a mixture otherwise.
WITHOUT_EXPERTS = ("metal", "compressed-tensors", "gptq", "dashq-packed-linear")
# The file of weights in one result of each format.
WEIGHT_FILES = {
    "dashq": "model.safetensors",
    "mlx": "model.safetensors",
    "metal": "model.safetensors",
    "compressed-tensors": "model.safetensors",
    "gptq": "model.safetensors",
    "dashq-packed-linear": "model.safetensors",
    "Q4_1": "model.gguf",
}


class FormatResults:
    """Result folders by the labels of `SCHEMES`, written when they are first asked for; none may be changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.model = written_once(folder / "model", _write_model)

    def __getitem__(self, label: str) -> Path:
        serializer, bits, size, solver = SCHEMES[label]
        scheme = small_scheme(size, bits=bits, solver=solver)
        return written_once(
            self._folder / label,
            lambda folder: run(build_recipe(self.model, folder, scheme=scheme, serializer=serializer)),
        )


def _write_model(folder: Path) -> None:
    sizes: dict[str, Any] = WIDE | {"num_hidden_layers": 1}
    pico_model("llama", folder, torch.float16, **sizes)
    (folder / "LICENSE").write_text("do as you like")
