"""A watch over the processes of a run: each tells when it fails, and is missed when it falls silent."""

import os
import sys
import threading
import time
from typing import Any

BEAT = 1.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one, after which a process counts as gone
FAILURE = "failure"


class Watch:
    """A thread that gives signs of life in the store that all processes share, and ends this one when another fails."""

    def __init__(self, store: Any, rank: int, count: int, name: str) -> None:
        self.name = name
        self._store, self._rank, self._count = store.clone(), rank, count  # a connection of its own
        self._ended = threading.Event()
        self._store.set(_sign(rank), f"0 {name}")
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def tell(self, reason: str) -> bool:
        """Tell the others that this process fails; False where another one has failed before."""
        self._ended.set()  # it has an end of its own to come to
        try:
            own = f"{self.name}: {reason}"
            return bool(self._store.compare_set(FAILURE, "", own).decode() == own)
        except RuntimeError:  # the store is gone, and with it whoever would hear of it
            return True

    def end(self) -> None:
        """This process is done; nobody misses it."""
        self._ended.set()
        self._thread.join()
        try:
            self._store.set(_sign(self._rank), "done")
        except RuntimeError:
            return

    def _watch(self) -> None:
        beats, last = 0, dict.fromkeys(range(self._count), ("", time.monotonic()))
        while not self._ended.wait(BEAT):
            beats += 1
            try:
                self._store.set(_sign(self._rank), f"{beats} {self.name}")
                if self._store.check([FAILURE]):
                    self._stop("")
                for rank in range(self._count):
                    if not self._store.check([_sign(rank)]):
                        continue
                    sign, (before, since) = self._store.get(_sign(rank)).decode(), last[rank]
                    if sign != before:
                        last[rank] = sign, time.monotonic()
                    elif sign != "done" and time.monotonic() - since > SILENCE:
                        self._stop(f"{sign.partition(' ')[2]} has given no sign of life for {SILENCE:g} seconds")
            except RuntimeError:
                self._stop("the process that the others meet at is gone")

    def _stop(self, reason: str) -> None:
        """End this process: the main thread may wait for one that will never answer. Nothing on disk needs it."""
        if self._ended.is_set():
            return
        if reason and self.tell(reason):
            print(f"dashq: {reason}: the same command goes on", file=sys.stderr, flush=True)
        os._exit(2)


def _sign(rank: int) -> str:
    return f"alive/{rank}"
