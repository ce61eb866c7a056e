"""The process that this one is among those of a run, and all that it says to the others."""

import json
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int64, Shaped
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from dashq.errors import DashqError, ProcessesError, UsageError, one_line
from dashq.processes.trees import outline, rebuilt, tensors_of
from dashq.processes.watch import Watch

Tree = TypeVar("Tree")

TIMEOUT = "DASHQ_TIMEOUT"  # the environment variable: seconds that a process waits for another one
SECONDS = 7200.0  # unless it says otherwise: the slowest layer of a huge model can take long
CPU = torch.device("cpu")
MEETING = timedelta(minutes=10)  # that processes may start after one another
NOTICE = 5.0  # seconds to hear why another process is gone
# The environment variable by which whoever waits for nccl is told that time is over, as with gloo: elsewhere torch ends
# the process without a word of ours.
NCCL_WAITS = "TORCH_NCCL_BLOCKING_WAIT"


@dataclass(frozen=True, eq=False)
class Processes:
    """This process among those of a run: number `rank` of `count`, counted from 0. Alone it says nothing to nobody.

    Every process calls these methods in the same order. Tensors travel on `device`; `traffic` counts the bytes that
    this one sent or received.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU
    traffic: list[int] = field(default_factory=lambda: [0])

    @property
    def is_first(self) -> bool:
        """True for the process that writes and speaks."""
        return self.rank == 0

    def own(self, shares: int, rank: int | None = None) -> range:
        """The shares of the samples that are this process's, or that of another rank, of so many in all."""
        rank = self.rank if rank is None else rank
        return range(rank * shares // self.count, (rank + 1) * shares // self.count)

    def of_first(self, compute: Callable[[], Any]) -> Any:
        """A value as JSON has it, which the first process computes for all."""
        return self.of(0, compute() if self.is_first else None)

    def of(self, rank: int, value: Any) -> Any:
        """The value, as JSON has it, that the process of this rank gives; the others' values do not count."""
        if self.count == 1:
            return value
        text = json.dumps(value).encode() if self.rank == rank else b""
        size = torch.tensor([len(text)])
        self.broadcast([size], rank)
        content = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else _bytes(int(size))
        self.broadcast([content], rank)
        return json.loads(content.numpy().tobytes())

    def of_all(self, value: Any) -> list[Any]:
        """The values of all processes, as JSON has them, in their order."""
        return [self.of(rank, value) for rank in range(self.count)]

    def broadcast(self, tensors: Sequence[Shaped[Tensor, "..."]], rank: int) -> None:
        """Fill tensors with the values that those of the process of this rank have."""
        for tensor in tensors if self.count > 1 else ():
            wire = self._wire(tensor)
            with self._reaching():
                dist.broadcast(wire, rank)
            if self.rank != rank:
                tensor.copy_(_unwired(wire, tensor))

    def total(self, counts: Sequence[int]) -> list[int]:
        """The sums of all processes' counts, which are whole numbers."""
        if self.count == 1:
            return list(counts)
        sums: Int64[Tensor, " counts"] = torch.tensor(counts, device=self.device)
        with self._reaching():
            dist.all_reduce(sums)
        self.traffic[0] += sums.nbytes
        return list(sums.tolist())

    def send(self, tree: Any, rank: int) -> None:
        """Send a tree of tensors to the process of this rank, which receives it."""
        header = json.dumps(outline(tree)).encode()
        content = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        for tensor in (torch.tensor([len(header)]), content, *tensors_of(tree)):
            if tensor.numel():
                with self._reaching():
                    dist.send(self._wire(tensor), rank)

    def receive(self, like: Tree, rank: int, device: torch.device) -> Tree:
        """The tree that the process of this rank sends, with its tensors on a device; it is built as another one is."""
        (size,) = self._received(torch.empty(1, dtype=torch.int64), rank).tolist()
        header = json.loads(self._received(_bytes(size), rank).numpy().tobytes())
        tensors = [
            self._received(torch.empty(shape, dtype=getattr(torch, dtype), device=self.device), rank).to(device)
            for dtype, shape in _tensors_in(header)
        ]
        tree: Tree = rebuilt(header, like, iter(tensors))
        return tree

    def _received(self, tensor: Shaped[Tensor, "..."], rank: int) -> Shaped[Tensor, "..."]:
        if not tensor.numel():
            return tensor
        wire = self._wire(tensor)
        with self._reaching():
            dist.recv(wire, rank)
        return _unwired(wire, tensor)

    def _wire(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, " bytes"]:
        """The bytes of a tensor, so that every type travels, on the device that they travel on."""
        wire = tensor.detach().to(self.device).contiguous().flatten().view(torch.uint8)
        self.traffic[0] += wire.nbytes
        return wire

    @contextmanager
    def _reaching(self) -> Generator[None]:
        """Turn what fails in between into a `ProcessesError`, unless another process has said why, which ends this."""
        try:
            yield
        except RuntimeError as error:
            time.sleep(NOTICE)  # the watch ends this process when it hears of a failure, or of a silent one
            raise ProcessesError(
                f"another process has ended, or did not answer for {timeout():g} seconds ({TIMEOUT} sets how many): "
                f"{one_line(error)[:200]}"
            ) from error


ALONE = Processes()
_here = ALONE


def here() -> Processes:
    """This process among those of the run that it takes part in; alone, where there is no other."""
    return _here


def timeout() -> float:
    """Seconds that a process waits for another one; a `UsageError` where the environment says none."""
    text = os.environ.get(TIMEOUT, str(SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UsageError(f"{TIMEOUT} should be a number of seconds, not {text!r}")
    return seconds


@contextmanager
def joined() -> Generator[Processes]:
    """Take part in the run of the processes that torchrun started, for the duration of the `with` statement.

    Nothing happens where this process was started alone, or takes part already. A failure is told to all others, which
    then end: only the first to fail raises it, with its number, and the others `SystemExit`.
    """
    global _here
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1" or _here is not ALONE:
        yield _here
        return
    device = CPU
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):  # one for each process
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        os.environ.setdefault(NCCL_WAITS, "1")
    wait = timedelta(seconds=timeout())
    try:
        store, rank, count = next(rendezvous("env://", timeout=MEETING))
        _check_kinds(store, rank, count, device.type)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=count,
            timeout=wait,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        raise ProcessesError(f"the processes do not find each other: {one_line(error)[:200]}") from error
    ended = False
    watch = Watch(store, rank, count, f"process {rank} of {count} on {socket.gethostname()}")
    _here = Processes(rank, count, device)
    try:
        with nullcontext() if _here.is_first else _silence():
            yield _here
        ended = True
    except Exception as error:
        if not watch.tell(one_line(error)):
            raise SystemExit(2) from error
        if rank == 0 or not isinstance(error, DashqError):
            raise
        raise type(error)(f"{watch.name}: {error}") from error
    except KeyboardInterrupt:
        watch.tell("interrupted")
        raise
    finally:
        watch.end()
        _here = ALONE
        if ended or device.type == "cpu":  # nccl would wait for others, which may be gone
            dist.destroy_process_group()


def _check_kinds(store: Any, rank: int, count: int, kind: str) -> None:
    """Wait for all processes; a `ProcessesError` where some speak through graphics processors and others do not.

    They would wait for each other in vain.
    """
    names = [f"here/{other}" for other in range(count)]
    store.set(names[rank], kind)
    store.wait(names, MEETING)
    kinds = [own.decode() for own in store.multi_get(names)]
    for other, own in enumerate(kinds):
        if own != kinds[0]:
            first, second = ("none" if each == "cpu" else "one" for each in (kinds[0], own))
            raise ProcessesError(
                f"the first of {count} processes has {first} of the graphics processors of its machine for itself, and "
                f"process {other} has {second}: start as many processes on each machine as it has, or hide them all "
                "(CUDA_VISIBLE_DEVICES=)"
            )


@contextmanager
def _silence() -> Generator[None]:
    """Let nothing be printed but errors: all processes would say the same."""
    logging.disable(logging.CRITICAL)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_alike(inputs: Mapping[str, str]) -> None:
    """Raise a `ProcessesError` that names what differs where processes are not all given the same `inputs`."""
    first, *others = here().of_all(dict(inputs))
    for rank, other in enumerate(others, start=1):
        different = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if different:
            key = different[0]
            values = f"{_short(other.get(key))} where the first has {_short(first.get(key))}"
            more = f", and {len(different) - 1} more differences" if len(different) > 1 else ""
            raise ProcessesError(f"process {rank} of {here().count} would not do the same: {key} is {values}{more}")


def _short(text: str | None) -> str:
    return "missing" if text is None else text if len(text) <= 60 else f"{text[:57]}..."


def _bytes(size: int) -> Shaped[Tensor, " bytes"]:
    return torch.empty(size, dtype=torch.uint8)


def _unwired(wire: Shaped[Tensor, " bytes"], like: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    return wire.view(like.dtype).view(like.shape).to(like.device)


def _tensors_in(header: Any) -> Iterator[tuple[str, list[int]]]:
    """Type and shape of each tensor in an outline, in its order."""
    if isinstance(header, dict) and "tensor" in header:
        yield header["tensor"], header["shape"]
    elif isinstance(header, dict):
        for part in header["fields"].values():
            yield from _tensors_in(part)
    elif isinstance(header, list):
        for part in header:
            yield from _tensors_in(part)
