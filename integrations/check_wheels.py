"""Build each distribution's wheel, install it alone, import it.

Each wheel goes into an environment of its own, together with what it declares and nothing else of ours but the core wheel
that the integrations depend on. Dependencies come from the package index.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEWEST = ROOT / "integrations" / "constraints-newest.txt"
CHECK = """
import importlib, importlib.util, json, sys
module = importlib.import_module(sys.argv[1])
missing = [n for n in module.__all__ if not hasattr(module, n)]
print(json.dumps({
    "file": module.__file__,
    "missing": missing,
    "heavy": sorted({"torch", "transformers", "openai", "jinja2", "litellm"} & set(sys.modules)),
    "others": [n for n in sys.argv[2:] if importlib.util.find_spec(n) is not None],
}))
"""
DISTRIBUTIONS = {
    "proxyprompt": (ROOT, ["langchain_core", "dspy", "torch", "openai", "langchain_proxyprompt"]),
    "langchain_proxyprompt": (
        ROOT / "integrations" / "langchain-proxyprompt",
        ["langchain", "dspy", "torch"],
    ),
    "dspy_proxyprompt": (ROOT / "integrations" / "dspy-proxyprompt", ["langchain_core", "torch"]),
}


def run(*command: str | Path) -> str:
    """Run a command, show its errors, return its output."""
    return subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Exit with an error at the first wheel that does not stand alone."""
    with tempfile.TemporaryDirectory() as folder:
        wheels: dict[str, Path] = {}
        for package, (source, absent) in DISTRIBUTIONS.items():
            out = Path(folder) / f"wheel-{package}"
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
            run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source)
            wheels[package] = next(out.glob("*.whl"))
            names = zipfile.ZipFile(wheels[package]).namelist()
            assert f"{package}/py.typed" in names, f"{wheels[package].name} lacks py.typed"
            assert not [n for n in names if n.split("/")[0] in ("tests", "examples", "benchmarks")], names
            venv = Path(folder) / f"venv-{package}"
            run(sys.executable, "-m", "venv", venv)
            python = venv / "bin" / "python"
            needed = [wheels["proxyprompt"], *([wheels[package]] if package != "proxyprompt" else [])]
            install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", NEWEST]
            run(*install, *needed)
            found = json.loads(run(python, "-W", "error::SyntaxWarning", "-c", CHECK, package, *absent))
            assert str(venv) in found["file"], found
            wrong = {name: found[name] for name in ("missing", "heavy", "others") if found[name]}
            assert not wrong, f"{package}: {wrong}"
            print(f"{wheels[package].name}: installs alone, imports, py.typed")


if __name__ == "__main__":
    main()
