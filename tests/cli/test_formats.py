"""`dashq formats` lists what each format holds and which programs open it."""

import re

from commands import call
from format_results import FormatResults


def test_formats_lists_every_format(results: FormatResults) -> None:
    outcome = call("formats")
    assert outcome.code == 0
    rows = [re.split(" {2,}", line.strip()) for line in outcome.output.splitlines()]
    assert ["compressed-tensors", "2–8", "any divisor", "symmetric, integer", "transformers, vllm"] in rows
    assert ["dashq-packed-linear", "2–4", "any", "real", "–"] in rows
    assert ["gguf", "2–6, 8", "16, 32", "real, symmetric", "gguf, llama.cpp, llama.cpp-float32"] in rows
    assert ["mlx", "2–6, 8", "32, 64, 128", "real", "mlx, mlx-lm"] in rows
