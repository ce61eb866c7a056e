"""Several processes of a command on this machine, started and watched by the launcher of torchrun."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

THREADS = "OMP_NUM_THREADS"


def launch(arguments: Sequence[str], processes: int) -> int:
    """The exit code of `python -m dashq` with these arguments in so many processes, which share the machine's threads.

    A process that fails says so itself; of one that another program has ended, a line tells here. Then all end.
    """
    os.environ.setdefault(THREADS, str(max(1, torch.get_num_threads() // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would tell the same in a page
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "dashq", *arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        first, _ = error.get_first_failure()
        if codes[first] < 0 and codes[first] != -signal.SIGTERM:
            name = signal.Signals(-codes[first]).name
            hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
            print(
                f"dashq: process {first} of {processes} was ended by {name}{hint}: the same command goes on",
                file=sys.stderr,
            )
        return max(codes[first], 0) or 2
    return 0
