"""One line of a bench's results, with the version, the day and the machine that it was measured with."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

CLONE = Path(__file__).parents[1]


def result_line(figures: Mapping[str, Any], device: str = "cpu", folder: Path = CLONE) -> str:
    """The figures as one line of JSON, for `bench/results/NAME.jsonl`; `folder` is the clone that was measured."""
    return json.dumps({**figures, "measured": measured(device, folder)})


def measured(device: str, folder: Path) -> dict[str, str]:
    """Version and commit of dashq, today's date, and the machine."""
    return {
        "version": importlib.metadata.version("dashq"),
        "commit": commit(folder),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(device),
    }


def commit(folder: Path) -> str:
    """The commit of a clone, with a + where the code was changed since; `unknown` where there is no clone."""
    try:
        head = git(folder, "rev-parse", "--short=7", "HEAD").stdout.strip()
        changed = git(folder, "diff", "--quiet", "HEAD", "--", "core", "plugins").returncode
    except OSError:  # git is not installed
        return "unknown"
    return head + "+" * bool(changed) if head else "unknown"


def git(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of git in a folder."""
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)


def machine(device: str) -> str:
    """The name of the graphics processor, or that of the processor with its vector units, and the number of threads."""
    threads = torch.get_num_threads()
    # Two processors of one name may differ in their units, and by them in all that is timed.
    units = torch.backends.cpu.get_cpu_capability()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{processor()} with {units}"
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def processor() -> str:
    """The processor's name as Linux tells it, else its architecture."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.machine()
