"""A model with code of its own for tests: a configuration, a network and a tokenizer that import each other."""

import json
import shutil
from pathlib import Path

CODE = {
    "configuration_own.py": (
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    ),
    "modeling_own.py": (
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "from .helper_own import FACTOR\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    ),
    "helper_own.py": "from .deeper_own import FACTOR\n",
    "deeper_own.py": "FACTOR = 1.0\n",
}
UNRELATED = "train.py"  # beside the model, and none of its code
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def with_own_code(model: Path, folder: Path) -> Path:
    """A copy of a pico Llama that is opened by code beside its weights; returns the folder."""
    shutil.copytree(model, folder)
    for name, content in {**CODE, UNRELATED: "print('unrelated')\n"}.items():
        (folder / name).write_text(content)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
