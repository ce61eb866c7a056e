"""A model whose attention has no whole super-blocks gets heads of zeros, with which it computes the same."""

from pathlib import Path

import torch
from bench.super_blocks import write_widened
from transformers import AutoModelForCausalLM

from family_results import FamilyResults


def test_heads_of_zeros_change_nothing(families: FamilyResults, tmp_path: Path) -> None:
    write_widened(str(families.model("qwen3")), tmp_path)
    model, wide = (AutoModelForCausalLM.from_pretrained(folder) for folder in (families.model("qwen3"), tmp_path))
    widths = [one.model.layers[0].self_attn.o_proj.in_features for one in (model, wide)]
    assert widths == [64, 256]
    tokens = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(wide(tokens).logits, model(tokens).logits)
