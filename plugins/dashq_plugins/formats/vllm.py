"""vLLM's opening of a checkpoint, for the formats that it reads."""

import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dashq import Opened
from dashq.model.location import Location

CACHE = 256 * 1024**2  # bytes for keys and values
CONTEXT = 256


def open_with_vllm(folder: Path, trust_remote_code: bool, dtype: str = "auto") -> Opened:
    """vLLM in this process: weights as its kernels multiply with them, logits in the type that it computes in."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # keeps the model in reach
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its log would appear between the lines of our table
    from vllm import LLM  # pyright: ignore[reportMissingImports] - optional

    from dashq.model.loading import read_config

    engine: Any = LLM(
        model=str(folder),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=1,
        kv_cache_memory_bytes=CACHE,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
    )
    model: Any = engine.apply_model(lambda model: model)[0]
    computed: torch.dtype = engine.llm_engine.model_config.dtype
    location = Location(folder, trust_remote_code=trust_remote_code)
    rounds = read_config(location).dtype == torch.float32  # its kernels for packed weights take 16 bits

    def logits(ids: list[int]) -> Tensor:
        return _logits(engine, ids)

    return Opened(
        weight=lambda name: multiplied_weight(model, name, computed),
        logits=logits,
        computes_in=computed,
        tolerance=torch.finfo(computed).eps if rounds else 0.0,
    )


def multiplied_weight(model: nn.Module, name: str, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
    """The [rows, columns] that a layer multiplies with, which are its outputs for unit vectors.

    A layer that the program fused with others, as its `packed_modules_mapping` says, gives its own rows alone.
    """
    owner, _, last = name.rpartition(".")
    mapping: Any = getattr(model, "packed_modules_mapping", {})
    fused, parts = next(((whole, parts) for whole, parts in mapping.items() if last in parts), (last, [last]))
    layer: Any = model.get_submodule(f"{owner}.{fused}")
    with torch.inference_mode():
        weight: Tensor = layer.quant_method.apply(layer, torch.eye(layer.input_size, dtype=dtype)).T
    return weight if last == fused else weight.split(layer.output_partition_sizes)[parts.index(last)]


def _logits(engine: Any, ids: list[int]) -> Float[Tensor, "tokens vocabulary"]:
    """Logits for the prompt's tokens come with the token that follows each, and the last with a generated one."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports] - optional

    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, logprobs=-1)
    answer = engine.generate({"prompt_token_ids": ids}, parameters, use_tqdm=False)[0]
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])
