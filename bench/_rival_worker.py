"""Times one other quantizer on one layer, in that quantizer's own environment; `python -m bench rivals` starts it."""

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

# With a weight, its inputs' second moment, the bits and the group size: the work to time, which returns what it found,
# and what turns that into dequantized weights, which is not timed.
Attempt = tuple[Callable[[], object], Callable[[object], Tensor]]


def main() -> None:
    """Read the layer, quantize it a few times, write the dequantized weight and the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("layer", help="a torch file with the tensors `weight` and `second_moment`")
    parser.add_argument("result", help="the torch file to write, with the tensor `weight` and the number `seconds`")
    for option in ("bits", "group", "repeat", "threads"):
        parser.add_argument(f"--{option}", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layer = torch.load(arguments.layer, weights_only=True)
    with torch.no_grad():
        rival = RIVALS[arguments.rival]
        found, seconds = timed(
            lambda: rival(layer["weight"].clone(), layer["second_moment"].clone(), arguments.bits, arguments.group),
            arguments.repeat,
        )
    torch.save({"weight": found, "seconds": seconds}, arguments.result)


def timed(prepare: Callable[[], Attempt], repeat: int) -> tuple[Tensor, float]:
    """The dequantized weights, and the median seconds of the work, without its first run."""
    seconds: list[float] = []
    found: list[Tensor] = []
    for _ in range(repeat + 1):
        work, dequantize = prepare()
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
        found = [dequantize(result)]
    return found[0].float(), statistics.median(seconds[1:])


def hqq(weight: Tensor, second_moment: Tensor, bits: int, group: int) -> Attempt:
    """HQQ with its default optimizer, along the inputs, on the CPU in float32; it uses no inputs, and packs nothing."""
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    settings = {"nbits": bits, "group_size": group, "axis": 1, "optimize": True, "bitpack": False, "device": "cpu"}

    def dequantize(found: object) -> Tensor:
        assert isinstance(found, tuple)
        codes, meta = found
        weights: Tensor = quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
        return weights

    return lambda: quantizer.quantize(weight, **settings), dequantize


def llm_compressor(weight: Tensor, second_moment: Tensor, bits: int, group: int) -> Attempt:
    """GPTQ of llm-compressor with its modifier's defaults: blocks of 128, 1 % damping, columns in order of activation.

    Scales and integer zeros come from the smallest and largest weight of each group, as its default observer has them.
    """
    quantization = importlib.import_module("compressed_tensors.quantization")
    parameters = importlib.import_module("compressed_tensors.quantization.utils").calculate_qparams
    quantize_weight = importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize").quantize_weight
    settings = {"num_bits": bits, "strategy": "group", "group_size": group, "symmetric": False, "actorder": "static"}
    scheme = quantization.QuantizationArgs(**settings)

    def work() -> object:
        low, high = weight.unflatten(1, (-1, group)).aminmax(dim=-1)
        scale, zero = parameters(low, high, scheme)
        found = quantize_weight(weight[None], second_moment[None], scale[None], zero[None], None, scheme, 128, 0.01)
        if found[2].any():
            raise ValueError("the second moment could not be factorized, and GPTQ fell back to rounding")
        return found[0][0]

    def dequantize(found: object) -> Tensor:
        assert isinstance(found, Tensor)
        return found

    return work, dequantize


def gptqmodel(weight: Tensor, second_moment: Tensor, bits: int, group: int) -> Attempt:
    """GPTQ of gptqmodel with its defaults but for zeros: blocks of 128, 5 % damping, groups in order of activation."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by default half of the cores, and it fails with fewer than 2
    options = {"bits": bits, "group_size": group, "sym": False, "offload_to_disk": False}
    settings = importlib.import_module("gptqmodel").QuantizeConfig(**options)
    task_of = importlib.import_module("gptqmodel.quantization.gptq").GPTQ
    rows, columns = weight.shape
    layer = torch.nn.Linear(columns, rows, bias=False)
    layer.weight.data = weight
    task = task_of(layer, settings)
    task.quantizer.configure(perchannel=True)
    # As its hooks leave it: a second moment of every token, and their number.
    task.H, task.nsamples, task._hessian_total_samples = second_moment, columns, columns

    def dequantize(found: object) -> Tensor:
        assert isinstance(found, tuple)
        weights: Tensor = found[0]
        return weights

    return task.quantize, dequantize


RIVALS: dict[str, Callable[[Tensor, Tensor, int, int], Attempt]] = {
    "hqq": hqq,
    "llm-compressor": llm_compressor,
    "gptqmodel": gptqmodel,
}

if __name__ == "__main__":
    main()
