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


def result_line(figures: Mapping[str, Any], device: str = "cpu") -> str:
    """The figures as one line of JSON, for `bench/results/NAME.jsonl`."""
    return json.dumps({**figures, "measured": measured(device)})


def measured(device: str = "cpu") -> dict[str, str]:
    """Version and commit of dashq, today's date, and the machine."""
    return {
        "version": importlib.metadata.version("dashq"),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(device),
    }


def commit() -> str:
    """The commit of this clone, with a + where the code was changed since; `unknown` where there is no clone."""
    try:
        head = git("rev-parse", "--short=7", "HEAD").stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", "core", "plugins").returncode
    except OSError:  # git is not installed
        return "unknown"
    return head + "+" * bool(changed) if head else "unknown"


def git(*words: str) -> subprocess.CompletedProcess[str]:
    """A command of git in the folder above this one."""
    return subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True)


def machine(device: str) -> str:
    """The name of the graphics processor or of the processor, and the number of threads."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def processor() -> str:
    """The processor's name as Linux tells it, else its architecture."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.machine()
