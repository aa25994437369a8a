"""Whose attempts are open: by host, process and its birth; what becomes of those whose process is gone."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from pathlib import Path
from typing import Any

from ._ledger_calls import change, removal, set_aside

__all__ = ["AHEAD", "birth_of", "drop_attempts", "owner", "settle_dead"]

AHEAD = "marked as sent ahead of its turn"
"""Stands as the error of a call that is marked as sent, durably, and has not left yet.

The mark goes when the call leaves, which is written and not waited for. So it is right after the death of the process;
after that of the machine such a call may have left, and counts as one that did.
"""


_MINE: dict[int, str] = {}


def owner() -> tuple[str, int, str]:
    """Host, process and birth of this process."""
    pid = os.getpid()
    if pid not in _MINE:  # another one after a fork
        _MINE.clear()
        _MINE[pid] = birth_of(pid)
    return socket.gethostname(), pid, _MINE[pid]


def settle_dead(connection: sqlite3.Connection, *, alone: bool = False) -> None:
    """Inside a transaction: settle the attempts of processes that are gone; ``alone``: of all others."""
    set_aside(connection, "state IN ('reserved', 'sent')")  # nobody could settle these
    query = "SELECT DISTINCT host, pid, born FROM attempt WHERE state IN ('reserved', 'sent')"
    owners = connection.execute(query).fetchall()
    if not alone:
        # Windows has no harmless signal 0; there rows of dead processes stay as they are.
        here = socket.gethostname() if os.name == "posix" else None
        owners = [one for one in owners if one[0] == here and not _alive(one[1], one[2])]
    if owners:
        theirs = "host = ? AND pid = ? AND born = ?"
        here, boot = socket.gethostname(), birth_of(os.getpid()).partition("/")[0]
        same_boot = [one for one in owners if boot and one[0] == here and one[2].startswith(f"{boot}/")]
        query = removal(f"state = 'sent' AND error = '{AHEAD}' AND {theirs}")
        connection.executemany(query, same_boot)
        drop_attempts(connection, theirs, owners)


def drop_attempts(connection: sqlite3.Connection, where: str, values: list[tuple[Any, ...]]) -> None:
    """Inside a transaction: attempts not sent vanish, those sent become unknown, finished ones stay."""
    connection.executemany(removal(f"state = 'reserved' AND {where}"), values)
    query = change(f"state = 'sent' AND {where}", state="'unknown'", finished_at="?1")
    connection.executemany(query, [(time.time(), *value) for value in values])


def birth_of(pid: int) -> str:
    """When a process began, in ticks since which boot, and in which space of process numbers; empty where unknown.

    Process numbers are used again, and a reservation must not wait for a namesake.
    """
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    return f"{boot[:13]}/{stat_line.rpartition(')')[2].split()[19]}/{_number_space()}"


def _number_space() -> str:
    """Containers on one host may share its name and not its process numbers."""
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return ""


def _alive(pid: int, born: str) -> bool:
    boot, _, rest = born.partition("/")
    space, mine = rest.partition("/")[2], birth_of(os.getpid())
    if space and mine.startswith(f"{boot}/") and not mine.endswith(f"/{space}"):
        return True  # nobody here knows; whoever opens the file alone does
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    now = birth_of(pid)
    # Rows of earlier versions do not name the space.
    return not born or not now or now.split("/")[:2] == born.split("/")[:2]
