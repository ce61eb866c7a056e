"""A small lm-eval task for tests, alone: lm-eval would read thousands of files of its own for long."""

import json
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from lm_eval.tasks import TaskManager

QUESTIONS = tuple(f"What is {number}?" for number in range(4))
CHOICES = ("a number", "a fish")
ANSWERS = (0, 1, 0, 1)


def offer_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the multiple-choice task `pico_choice` in a folder, and let lm-eval know no other."""
    rows = [
        {"question": question, "choices": CHOICES, "answer": answer}
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "task": "pico_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "pico_choice.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    return folder
