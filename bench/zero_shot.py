"""Accuracy on the eight zero-shot tasks of the papers in this field, from local files: one JSON line for each model.

The questions are in FOLDER/TASK_validation.jsonl, a task's name as lm-eval has it; its own task files say how to ask.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import lm_eval.tasks
import yaml

from bench._record import result_line
from dashq.measuring.evaluate import find_tasks, load_model, run_tasks

# lm-eval's file of each task, the file of its questions, and the metric that is customary.
TASKS = {
    "arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge", "acc_norm"),
    "arc_easy": ("arc/arc_easy.yaml", "arc_easy", "acc_norm"),
    "boolq": ("super_glue/boolq/default.yaml", "boolq", "acc"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag", "acc_norm"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "openbookqa", "acc_norm"),
    "piqa": ("piqa/piqa.yaml", "piqa", "acc_norm"),
    "social_iqa": ("siqa/siqa.yaml", "siqa", "acc"),
    "winogrande": ("winogrande/default.yaml", "winogrande_xl", "acc"),
}


def main() -> None:
    """Judge one model after the other, printing a line when it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench zero_shot", description=__doc__)
    parser.add_argument("models", nargs="*", default=["models/SmolLM2-135M-Instruct"], metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the questions are")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--limit", type=int, help="at most so many questions of each task")
    parser.add_argument("--task-files", type=Path, help="only write them here, for dashq eval --include-path")
    arguments = parser.parse_args()
    if arguments.task_files:
        return write_tasks(arguments.task_files, arguments.data)
    with TemporaryDirectory() as folder:
        write_tasks(Path(folder), arguments.data)
        manager = find_tasks(arguments.tasks, Path(folder))
        for name in arguments.models:
            scores = run_tasks(load_model(name), arguments.tasks, manager, arguments.limit)
            print(result_line({"model": name, "limit": arguments.limit, **figures(scores)}), flush=True)
    return None


def write_tasks(folder: Path, data: Path) -> None:
    """lm-eval's own tasks, reading local files."""
    folder.mkdir(parents=True, exist_ok=True)
    stock = Path(lm_eval.tasks.__file__).parent
    for task, (file, questions, _) in TASKS.items():
        path = (data / f"{questions}_validation.jsonl").absolute()
        if not path.is_file():
            raise SystemExit(f"there are no questions of {task}: {path} is missing")
        content = {
            "include": str(stock / file),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(path)}},
            "training_split": None,
            "validation_split": "validation",
            "test_split": None,
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(content))


def figures(scores: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
    """Accuracies of each task, and the mean of the customary ones, all in percent."""
    tasks = {
        task: {metric: 100 * value for metric, value in found.items() if metric in ("acc", "acc_norm")}
        for task, found in scores.items()
    }
    return {"average": sum(found[TASKS[task][2]] for task, found in tasks.items()) / len(tasks), "tasks": tasks}


if __name__ == "__main__":
    main()
