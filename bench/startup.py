"""CPU seconds of the commands that should answer at once, and of `dashq plan`, each in a process of its own."""

import argparse
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench._record import result_line

CHECKOUT = Path(__file__).parents[1]


def main() -> None:
    """Print one line for each command."""
    parser = argparse.ArgumentParser(prog="python -m bench startup", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--checkout", type=Path, default=CHECKOUT, help="A checkout with its .venv, to measure instead."
    )
    parser.add_argument("--note", default="", help="Words that tell this line from others, as `before`.")
    arguments = parser.parse_args()
    program = str(arguments.checkout / ".venv" / "bin" / "dashq")
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(Path(folder), arguments.checkout).items():
            seconds = [cpu_seconds([program, *command]) for _ in range(arguments.repeat)]
            figures = {"command": name, "note": arguments.note, "runs": arguments.repeat}
            figures |= {
                "cpu_seconds": round(statistics.median(seconds), 2),
                "least_cpu_seconds": round(min(seconds), 2),
            }
            print(result_line(figures, folder=arguments.checkout), flush=True)


def commands(folder: Path, checkout: Path) -> dict[str, Sequence[str]]:
    """The arguments of each command by its name in the table; files are written into the folder.

    SmolLM2 is looked for in models/ of the working directory, where the recipe has it.
    """
    bad = folder / "bad.yaml"
    bad.write_text("model: somewhere\noutput: out\nscheme: {bits: 2, solver: no_such_solver}\n")
    new = ["plugins", "new", "my_solver", "--kind", "solver", "--folder"]
    return {
        "--version": ["--version"],
        "plugins new": [*new, str(folder)],
        "plugins list": ["plugins", "list"],
        "formats": ["formats"],
        "plan, bad recipe": ["plan", str(bad)],
        "run, bad recipe": ["run", str(bad)],
        "plan, SmolLM2": ["plan", str(checkout / "recipes" / "smollm2_2bit.yaml")],
    }


def cpu_seconds(command: Sequence[str]) -> float:
    """User and system time of a command with one thread, whatever its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, _, usage = os.wait4(process.pid, 0)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
