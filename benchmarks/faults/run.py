"""How many faults were injected in the long run of the fault suite, and what came of them?

    python benchmarks/faults/run.py          (or: make faults)

Runs ``tests/faults`` with ``--faults long``, in three processes because most of it waits, and writes
``results.json`` and ``results.md``: what each test injected
and saw. A failing test fails the run, and says so in the result.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def run() -> dict[str, Any]:
    """Run the suite; returns what is published."""
    with tempfile.TemporaryDirectory() as folder:
        tally, junit = Path(folder, "tally.json"), Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-q", "tests/faults", "--faults", "long"]
        command += ["--faults-tally", str(tally), f"--junitxml={junit}", "-o", "timeout=1200", "-n", "3"]
        started = time.time()
        status = subprocess.run(command, cwd=ROOT).returncode
        seconds = time.time() - started
        counts = {
            test: did
            for part in Path(folder).glob("tally.json*")
            for test, did in json.loads(part.read_text()).items()
        }
        cases = list(ElementTree.parse(junit).getroot().iter("testcase")) if junit.exists() else []
    tests = []
    for case in cases:
        failed = any(child.tag in ("failure", "error") for child in case)
        name = case.get("name", "")
        tests.append(
            {
                "module": (case.get("classname") or "").rpartition(".")[2],
                "test": name,
                "passed": not failed,
                "seconds": round(float(case.get("time", 0)), 1),
                "counts": counts.get(name, {}),
            }
        )
    return {
        "command": "python benchmarks/faults/run.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            **{
                name: metadata.version(name) for name in ("proxyprompt-core", "openai", "xllamacpp", "pytest")
            },
        },
        "seconds": round(seconds),
        "passed": status == 0,
        "tests": tests,
    }


def shown(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    failed = sum(not test["passed"] for test in result["tests"])
    lines = [
        "# Faults injected in the long run",
        "",
        f"`{result['command']}`, {result['date']}, {result['hardware']}; {versions}; "
        f"{result['seconds'] // 60} minutes. {len(result['tests'])} tests, {failed} failed.",
        "",
        "A test fails on the first answer that is wrong, lost after it was acknowledged, or bought again beyond the calls",
        "in flight, on an error of an undocumented type, and on a bill that the ledger does not cover.",
        "",
    ]
    totals: dict[str, int] = {}
    for test in result["tests"]:
        for name in ("kills", "injected", "torn commits", "faulty answers", "interrupts"):
            totals[name] = totals.get(name, 0) + test["counts"].get(name, 0)
    lines += ["In all: " + ", ".join(f"{count} {name}" for name, count in totals.items() if count) + ".", ""]
    lines += ["| module | test | result | seconds | counts |", "|---|---|---|---|---|"]
    for test in result["tests"]:
        counts = "; ".join(
            f"{name}: {count}" for name, count in test["counts"].items() if not name.startswith("at ")
        )
        name = test["test"].removeprefix("test_").replace("_", " ").replace("|", "/")
        outcome = "passed" if test["passed"] else "**failed**"
        lines.append(f"| {test['module']} | {name} | {outcome} | {test['seconds']} | {counts} |")
    points: dict[str, int] = {}
    for test in result["tests"]:
        for name, count in test["counts"].items():
            if name.startswith("at "):
                points[name[3:]] = points.get(name[3:], 0) + count
    if points:
        lines += ["", "## Kills by point", "", "| point | kills |", "|---|---|"]
        lines += [f"| `{name}` | {count} |" for name, count in sorted(points.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and write."""
    result = run()
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "results.md").write_text(shown(result))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
