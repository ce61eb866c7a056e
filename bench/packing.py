"""How fast each format packs and unpacks: megabytes of float32 weights a second, of a random layer of 2048 × 4096."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from bench._record import result_line
from dashq import Grouping, PlanError, Quantized, load_registry
from dashq.solving.arithmetic import round_to_nearest
from dashq.strategies import Serializer

ROWS, COLUMNS = 2048, 4096
SIZES = (64, 32, 16)  # the first that the format takes


def main() -> None:
    """Print one line for each format and number of bits."""
    parser = argparse.ArgumentParser(prog="python -m bench packing", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    for name, cls in load_registry().serializers.items():
        serializer = cls()
        for bits in range(1, 9):
            quantized = _quantize(serializer, weight, bits)
            if quantized:
                print(result_line({"format": name, "bits": bits, **_speeds(serializer, quantized, repeat)}), flush=True)


def _quantize(serializer: Serializer, weight: torch.Tensor, bits: int) -> Quantized | None:
    """The layer by min-max rounding, in the largest groups that the format takes; None where it takes none."""
    for size in SIZES:
        grouping = Grouping(columns=COLUMNS, size=size)
        try:
            quantized = round_to_nearest(grouping.split(weight), serializer.grid(bits), grouping)
            serializer.pack(quantized)
        except PlanError:
            continue
        return quantized
    return None


def _speeds(serializer: Serializer, quantized: Quantized, repeat: int) -> dict[str, Any]:
    q, packed = quantized, serializer.pack(quantized)
    megabytes = ROWS * COLUMNS * 4 / 1e6
    packing = _least(lambda: serializer.pack(q), repeat)
    unpacking = _least(lambda: serializer.unpack(packed, COLUMNS, q.grouping.size, q.grid), repeat)
    return {
        "group_size": q.grouping.size,
        "threads": torch.get_num_threads(),
        "packed_mb_per_second": round(megabytes / packing),
        "unpacked_mb_per_second": round(megabytes / unpacking),
    }


def _least(work: Callable[[], object], repeat: int) -> float:
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
