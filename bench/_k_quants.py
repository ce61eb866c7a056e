"""llama.cpp's own quantizer on the same layers, with the same importances, as a rival of the solver `k_quant`."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

from dashq_plugins.formats.gguf.programs import in_float32, rewrite

KEEP = ("attn", "ffn_gate", "ffn_up", "token_embd")


def quantize_with_llama_cpp(
    program: Path, folder: Path, model: Path, importance: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of all `down_proj` as `llama-quantize` makes them Q2_K, by layer name.

    `folder` is a result in a GGUF file whose `down_proj` are quantized alone.
    """
    original, weighed, made = (folder / f"{name}.gguf" for name in ("original", "importance", "theirs"))
    weights = load_file(model / "model.safetensors")
    layers = [name for name in importance if name.endswith("down_proj")]
    names = {f"blk.{name.split('.')[2]}.ffn_down.weight": name for name in layers}

    def numbers(tensor: Any) -> Any:
        return weights[f"{names[tensor.name]}.weight"].half().numpy() if tensor.name in names else tensor.data

    rewrite(folder / "model.gguf", original, numbers)
    _write_importance(weighed, {name: importance[layer] for name, layer in names.items()})
    kept = [word for part in KEEP for word in ("--tensor-type", f"{part}=f16")]
    words = [str(program), "--imatrix", str(weighed), "--tensor-type", "ffn_down=q2_K", *kept, "--pure"]
    subprocess.run([*words, str(original), str(made), "Q2_K", "1"], check=True, capture_output=True)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(made).tensors}
    kinds = {tensors[name].tensor_type.name for name in names}
    others = {tensor.tensor_type.name for name, tensor in tensors.items() if name not in names}
    assert (kinds, others) == ({"Q2_K"}, {"F16", "F32"}), (kinds, others)
    return {layer: torch.from_numpy(in_float32(tensors[name])) for name, layer in names.items()}


def _write_importance(target: Path, importance: Mapping[str, Tensor]) -> None:
    """An importance matrix as `llama-imatrix` writes it: sums of squares of inputs, and of how many tokens."""
    writer = gguf.GGUFWriter(target, "", use_temp_file=False)
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for name, values in importance.items():
        writer.add_tensor(f"{name}.in_sum2", values.float()[None].numpy())
        writer.add_tensor(f"{name}.counts", torch.ones(1, 1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
