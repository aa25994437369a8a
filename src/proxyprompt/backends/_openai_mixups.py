"""Answers that belong to another request.

Where a server or a proxy delivers one HTTP response twice, the surplus copy stays in the connection's buffer, and the
HTTP library hands it out as the response to the next request. Only the answer's ``id`` gives it away.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

_MOST = 20_000
"""Answers remembered; a surplus copy comes at once or never."""


class Answered:
    """Remembers which request each answer belonged to."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()
        self._foreign: set[tuple[str, bytes]] = set()
        self._tells = True

    def is_foreign(self, name: object, body: Mapping[str, Any], answer: Mapping[str, Any]) -> bool:
        """Whether the answer called ``name`` has answered another body before.

        The same answer to the same body is no mix-up: caches of servers do that. Without an ``id`` nothing can be told, nor
        on a server that has given one ``id`` to answers that differ, or the same foreign answer to one body twice: a
        surplus copy comes once.
        """
        if not isinstance(name, str) or not name or not self._tells:
            return False
        asked, told = _digest(body), _digest(answer)
        known_asked, known_told = self._requests.setdefault(name, (asked, told))
        if len(self._requests) > _MOST:
            self._requests.popitem(last=False)
        foreign = known_asked != asked
        if known_told != told or (foreign and (name, asked) in self._foreign):
            self._tells = False
            self._requests.clear()
            self._foreign.clear()
            return False
        if foreign:
            self._foreign.add((name, asked))
        return foreign


def _digest(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
