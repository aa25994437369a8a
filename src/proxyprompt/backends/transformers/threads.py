"""How many threads to compute with, decided by measuring."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from proxyprompt._require import require

__all__ = ["choose_threads", "import_torch", "use_threads"]


def import_torch() -> Any:
    """Import torch with OpenMP threads that sleep at barriers instead of spinning.

    Spinning threads wait for a core that another process holds: two threads were then seven times slower
    than one. The policy can only be set before torch is loaded, and is left alone where the user set it.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return require("torch", "transformers")


def choose_threads(torch: Any) -> int:
    """Number of threads that multiply matrices fastest right now.

    Returns
    -------
    int
        ``torch.get_num_threads()`` where the user decided (``OMP_NUM_THREADS``) or where that many threads
        are at least 1.2 times as fast as one; otherwise 1.

    Notes
    -----
    Takes about 0.1 s. The count of cores says nothing about how many of them are free.
    """
    most = int(torch.get_num_threads())
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return most
    left, right = torch.ones(256, 1024), torch.ones(1024, 1024)

    def seconds(threads: int) -> float:
        with use_threads(torch, threads):
            best = float("inf")
            for _ in range(5):
                began = time.perf_counter()
                left @ right
                best = min(best, time.perf_counter() - began)
        return best

    seconds(most)
    return most if seconds(1) >= 1.2 * seconds(most) else 1


@contextmanager
def use_threads(torch: Any, threads: int) -> Iterator[None]:
    """Compute with ``threads`` threads inside the block and put the process's setting back after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
