"""Lessons hold the original model's last hidden states, from which its logits follow."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dashq.calibration.shell import shell_of
from dashq.calibration.tokens import Drawn
from dashq.quantizing.opening import open_model
from dashq.tuning.teacher import Teacher
from recipes import build_recipe

DRAWN = Drawn(
    samples=torch.arange(3 * 20).reshape(3, 20) * 7 % 300, held_out=torch.arange(2 * 20).reshape(2, 20) * 11 % 300
)


def test_logits_of_the_lessons_are_those_of_the_original(model: Path, tmp_path: Path) -> None:
    opened = open_model(build_recipe(model, tmp_path / "out", dtype="float32"))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        teacher = Teacher(opened, DRAWN)
        for block in opened.walk():
            teacher.pass_original(block)
        samples, held_out = teacher.lessons()
        assert torch.cat([lesson.tokens for lesson in samples]).equal(DRAWN.samples)
        assert torch.cat([lesson.tokens for lesson in held_out]).equal(DRAWN.held_out)
        with shell_of(opened, head=True) as shell:
            for lesson in [*samples, *held_out]:
                predicted = shell.predict(lesson.tokens, lesson.states)
                torch.testing.assert_close(predicted, network(lesson.tokens).logits, rtol=1e-4, atol=1e-4)
