"""The way from `git clone` to an answer of a quantized model, leg by leg, and the commands that each program takes.

A clone of this repository goes through the commands of the quickstart in a folder of its own: packages come from where
pip finds them on this machine, and kernels are compiled anew. CPU seconds are those of the leg's processes, which other
work on the machine changes least. The commands until an answer are those at the head of each program's section in
docs/programs.md.
"""

import argparse
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench._record import CLONE, result_line
from bench.seconds import cpu_seconds_of_children

MODEL = "models/SmolLM2-135M-Instruct"
LEGS = {
    "clone": f"git clone --quiet {CLONE} .",
    "install": "make --silent .venv/installed",
    "model": f"make --silent {MODEL}/config.json",
    "quantize": f".venv/bin/dashq run {MODEL} --bits 3 --text pydoc --fast --quiet",
    "chat": ".venv/bin/dashq chat out/SmolLM2-135M-Instruct-3bit --prompt 'What is the capital of France?'",
    "picture": ".venv/bin/dashq analyze out/SmolLM2-135M-Instruct-3bit.yaml --bits 2,3 --plot svg --quiet",
}
SECTION = re.compile(r"## ([\w.]+)\n\n```sh\n(.*?)```", re.DOTALL)


def main() -> None:
    """Print one line for each leg, and one for each program."""
    summary, _, explanation = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench road", description=summary, epilog=explanation)
    parser.add_argument("--legs", nargs="*", choices=LEGS, default=[*LEGS], help="to leave out some of the last ones")
    parser.add_argument("--folder", type=Path, help="for the clone, which stays there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for leg in arguments.legs:
            print(result_line(walk(leg, arguments.folder or Path(folder))), flush=True)
    for program, commands in programs().items():
        print(result_line({"program": program, "commands": commands}))


def walk(leg: str, folder: Path) -> dict[str, Any]:
    """Seconds of one leg, and the last line that it says."""
    clone = folder.absolute() / "dashq"
    clone.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(clone.with_name("kernels"))}
    before, begin = cpu_seconds_of_children(), time.perf_counter()
    done = subprocess.run(LEGS[leg], shell=True, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True)
    seconds, cpu_seconds = time.perf_counter() - begin, cpu_seconds_of_children() - before
    if done.returncode:
        raise SystemExit(f"{LEGS[leg]}: exit status {done.returncode}")
    says = (done.stdout.strip().splitlines() or [""])[-1]
    return {"leg": leg, "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), "says": says}


def programs() -> dict[str, list[str]]:
    """The commands from a model to an answer by program."""
    page = (CLONE / "docs" / "programs.md").read_text("utf-8").replace("\\\n", "")
    return {program: block.strip().splitlines() for program, block in SECTION.findall(page)}


if __name__ == "__main__":
    main()
