"""Quantizes one model with another program, in that program's own environment; `python -m bench peers` starts it."""

import argparse
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench._rival_worker import hqq

Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Request:
    """What to quantize, and on which tokens; every program computes in float32."""

    model: str
    tokens: Tensor
    bits: int
    group: int
    iterations: int

    def network(self) -> Any:
        network: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return network.eval()


def main() -> None:
    """Quantize, and write every weight, in place of quantized ones what they stand for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", help="the absolute path of a folder that transformers opens")
    parser.add_argument("tokens", help="a safetensors file with the tensor `tokens`, samples x tokens")
    parser.add_argument("result", help="the safetensors file to write")
    for option in ("bits", "group", "iterations", "threads"):
        parser.add_argument(f"--{option}", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.chdir(Path(arguments.result).parent)  # some programs leave logs where they run
    tokens = load_file(arguments.tokens)["tokens"]
    request = Request(arguments.model, tokens, arguments.bits, arguments.group, arguments.iterations)
    save_file(PEERS[arguments.peer](request), arguments.result)


def weights(network: nn.Module) -> Weights:
    """Weights and biases by name, each in memory of its own."""
    state = network.state_dict()
    return {name: state[name].float().clone() for name in state if name.rpartition(".")[2] in ("weight", "bias")}


def llm_compressor_gptq(request: Request) -> Weights:
    """GPTQ with its modifier's defaults: blocks of 128, 1 % damping, columns in order of activation."""
    modifier = importlib.import_module("llmcompressor.modifiers.gptq").GPTQModifier
    return one_shot(request, [modifier(**scheme(request))])


def llm_compressor_awq(request: Request) -> Weights:
    """AWQ with its modifier's defaults: 20 scalings for each group of layers, of activations and weights."""
    modifier = importlib.import_module("llmcompressor.modifiers.transform.awq").AWQModifier
    if not torch.cuda.is_available():  # AWQ pins memory all the same, which fails where there is nothing to copy to
        importlib.import_module("llmcompressor.pipelines.cache").IntermediatesCache.pin_memory = lambda *_: None
    rounding = importlib.import_module("llmcompressor.modifiers.quantization").QuantizationModifier
    return one_shot(request, [modifier(), rounding(**scheme(request))])


def scheme(request: Request) -> dict[str, Any]:
    """llm-compressor's scheme for every linear layer but the head, with whole zeros."""
    quantization = importlib.import_module("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(
        num_bits=request.bits, strategy="group", group_size=request.group, symmetric=False
    )
    group = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    return {"config_groups": {"group": group}, "ignore": ["lm_head"]}


def one_shot(request: Request, modifiers: list[object]) -> Weights:
    """What llm-compressor makes of the model."""
    network = request.network()
    rows = {"input_ids": request.tokens.tolist(), "attention_mask": torch.ones_like(request.tokens).tolist()}
    importlib.import_module("llmcompressor").oneshot(
        model=network,
        tokenizer=AutoTokenizer.from_pretrained(request.model),
        recipe=modifiers,
        dataset=importlib.import_module("datasets").Dataset.from_dict(rows),
        num_calibration_samples=len(request.tokens),
        max_seq_length=request.tokens.shape[1],
    )
    quantize = importlib.import_module("compressed_tensors.quantization").forward_quantize
    for module in network.modules():
        if hasattr(module, "weight_scale"):
            module.weight.data = quantize(module, module.weight.data, "weight", module.quantization_scheme.weights)
    return weights(network)


def gptqmodel(request: Request) -> Weights:
    """GPTQ with its defaults, but with zeros that are not all in the middle, and the result kept in memory."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by default half of the cores, and it fails with fewer than 2
    library = importlib.import_module("gptqmodel")
    settings = library.QuantizeConfig(
        bits=request.bits,
        group_size=request.group,
        sym=False,
        format="gptq_v2",  # in the older format a packed layer holds zeros less one, and would dequantize shifted
        offload_to_disk=False,
    )
    model = library.GPTQModel.load(request.model, settings, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in request.tokens]
    model.quantize(rows, batch_size=1)
    return {
        f"{name}.weight": module.dequantize_weight().T.float().contiguous()
        for name, module in model.model.named_modules()
        if hasattr(module, "dequantize_weight")
    }


def auto_round(request: Request) -> Weights:
    """Signed gradient descent on rounding and ranges with its defaults, but for zeros, samples and iterations."""
    network = request.network()
    importlib.import_module("auto_round").AutoRound(
        network,
        AutoTokenizer.from_pretrained(request.model),
        bits=request.bits,
        group_size=request.group,
        sym=False,
        iters=request.iterations,
        dataset=torch.utils.data.DataLoader([{"input_ids": row} for row in request.tokens], batch_size=1),  # type: ignore[arg-type]
        nsamples=len(request.tokens),
        seqlen=request.tokens.shape[1],
        device_map="cpu",
    ).quantize()
    return weights(network)


def hqq_layers(request: Request) -> Weights:
    """HQQ with its default optimizer on every linear layer of every block; it uses no text, and its zeros are real."""
    found = {}
    for name, module in request.network().model.layers.named_modules():
        if isinstance(module, nn.Linear):
            work, dequantize = hqq(module.weight.data, torch.empty(0), request.bits, request.group)
            found[f"model.layers.{name}.weight"] = dequantize(work())
    return found


PEERS: dict[str, Callable[[Request], Weights]] = {
    "llm-compressor-gptq": llm_compressor_gptq,
    "llm-compressor-awq": llm_compressor_awq,
    "gptqmodel": gptqmodel,
    "auto-round": auto_round,
    "hqq": hqq_layers,
}

if __name__ == "__main__":
    main()
