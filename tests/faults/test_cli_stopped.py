"""`proxyprompt run` on a real server, stopped at any phase by Ctrl-C, kill -9 or a hang-up: the same report in the end."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from proxyprompt.ledger import Ledger

from .proxy import PASS, Fault, FaultProxy

CONFIG = """
title = "Stopped"
[prompt]
demonstrations = "demos.jsonl"
demonstration_template = "Review: {{input}}\\nSentiment: {{output}}"
[queries]
file = "queries.jsonl"
sizes = {{explain = 6, select = 8, sealed = 12}}
[task]
labels = ["positive", "negative"]
[attribution]
oracle_queries = 4
[target]
model = "openai:smol"
base_url = "{url}"
concurrency = 4
"""
WORDS = {
    "positive": ("great", "moving", "a joy", "funny", "superb"),
    "negative": ("dull", "a bore", "awful", "flat", "silly"),
}


def _row(number: int) -> dict[str, str]:
    label = ("positive", "negative")[number % 2]
    return {"id": f"r{number}", "input": f"film {number} is {WORDS[label][number // 2 % 5]}", "label": label}


def _config(folder: Path, url: str) -> Path:
    (folder / "demos.jsonl").write_text("\n".join(json.dumps(_row(100 + k)) for k in range(4)))
    (folder / "queries.jsonl").write_text("\n".join(json.dumps(_row(k)) for k in range(26)))
    (folder / "config.toml").write_text(CONFIG.format(url=url))
    return folder / "config.toml"


# Started in the background of a shell, a process ignores Ctrl-C, and so would its children.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from proxyprompt.cli import main
main()
"""


def _start(config: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, "run", str(config), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finished(config: Path, out: Path) -> dict[str, Any]:
    child = _start(config, out)
    _, told = child.communicate(timeout=300)
    assert child.returncode == 0, told
    body = json.loads((out / "artifact.json").read_text())
    return _without(body)


def _without(value: Any) -> Any:
    """All but when it was made and what it took: calls in flight at a stop are paid twice, and say so."""
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in TAKEN}
    return [_without(item) for item in value] if isinstance(value, list) else value


TAKEN = {"created", "spent", "calls_bought", "calls_reused", "tokens_bought", "tokens_reused"}
TAKEN |= {"target_tokens_total", "break_even_calls"}


def test_stopped_and_resumed(proxy: FaultProxy, tmp_path: Path, tally: Counter[str], long: bool) -> None:
    def slowly(exchange: Any) -> None:
        time.sleep(0.01)
        PASS.act(exchange)

    slow = Fault("slow", slowly, billed=True, told=True)
    proxy.plan = lambda request, arrival: slow
    config = _config(tmp_path, proxy.url)
    undisturbed = _finished(config, tmp_path / "whole")
    prompt = (tmp_path / "whole" / "prompt.json").read_bytes()
    calls = len(proxy.bill)
    rng = random.Random(4)
    signs = [signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP]
    for round_ in range(8 if long else 1):
        out, stops = tmp_path / f"out-{round_}", 0
        proxy.bill.clear()
        for sign in rng.sample(signs, 4):
            until = len(proxy.bill) + rng.randint(0, calls // 3)
            child = _start(config, out)
            while len(proxy.bill) < until and child.poll() is None:
                time.sleep(0.002)
            if until == 0:
                time.sleep(rng.random())
            child.send_signal(sign)
            _, told = child.communicate(timeout=60)
            if child.returncode == 0:
                break
            stops += 1
            tally[f"stopped by {sign.name}"] += 1
            if sign is signal.SIGINT and not re.search(
                r'"<string>", line [1-4],', told
            ):  # while it was imported
                assert child.returncode == 130, told
                assert "Traceback" not in told
                assert "run the same command to go on" in told
        assert _finished(config, out) == undisturbed
        assert (out / "prompt.json").read_bytes() == prompt
        assert len(proxy.bill) - calls <= 4 * stops, "more than the calls in flight were bought again"
        with Ledger(out / "ledger.db") as ledger:
            totals = ledger.totals()
        assert (totals.done, totals.failed, totals.open) == (calls, 0, 0)
        assert len(proxy.bill) <= totals.done + totals.unknown
        tally["runs"] += 1
        tally["calls bought again"] += len(proxy.bill) - calls
        shutil.rmtree(out)
