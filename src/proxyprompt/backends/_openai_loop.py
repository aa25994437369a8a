"""An event loop for the life of a connection, whichever threads its callers have."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self, threads: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.threads = ThreadPoolExecutor(threads + 2, thread_name_prefix="proxyprompt-openai-call")
        self._thread = threading.Thread(
            target=_run_forever, args=(self.loop,), name="proxyprompt-openai", daemon=True
        )
        self._pid = os.getpid()
        self._thread.start()

    def close(self, clients: Sequence[Any] = ()) -> None:
        """Cancel what is under way, close ``clients`` and stop."""
        if self.loop.is_closed() or self._pid != os.getpid():
            return
        asyncio.run_coroutine_threadsafe(_wind_up(clients), self.loop)
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        self.threads.shutdown(wait=False, cancel_futures=True)


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _wind_up(clients: Sequence[Any]) -> None:
    loop, own = asyncio.get_running_loop(), asyncio.current_task()
    tasks = [task for task in asyncio.all_tasks(loop) if task is not own]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    try:
        for client in clients:
            await client.close()
    finally:
        loop.call_soon(loop.stop)
