"""The public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import proxyprompt


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in proxyprompt.__all__:
        value = getattr(proxyprompt, name)
        if name != "__version__":
            assert value.__doc__, f"{name} has no docstring"
    assert sorted(proxyprompt.__all__) == dir(proxyprompt)


def test_import_is_silent_and_loads_nothing_heavy() -> None:
    code = """
import logging, socket, sys
before = logging.root.level, len(logging.root.handlers)
def closed(*a, **k): raise SystemExit("a socket was opened")
socket.socket = closed
import proxyprompt
assert (logging.root.level, len(logging.root.handlers)) == before
heavy = {"numpy", "scipy", "torch", "transformers", "openai", "jinja2", "rich", "click"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
