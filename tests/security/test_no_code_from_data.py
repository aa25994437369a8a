"""Nothing that this project ships can turn data into code: a test over the syntax of every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    p for top in ("src", "integrations") for p in (ROOT / top).rglob("*.py") if "/tests/" not in p.as_posix()
)

# Formats that hold code, and ways to run text.
MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "dbm", "diskcache", "sqlitedict",
    "jsonpickle", "pickletools", "code", "codeop", "runpy", "pty", "imp",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    ("os", "system"), ("os", "popen"), ("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"),
    ("yaml", "full_load"), ("pandas", "read_pickle"), ("np", "load"), ("numpy", "load"), ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"), ("string", "Formatter"), ("builtins", "eval"), ("builtins", "exec"),
}  # fmt: skip
ATTRIBUTES = {"__globals__", "__subclasses__", "__builtins__", "__reduce__", "__reduce_ex__"}


def findings(source: str) -> list[str]:
    """What in a module could run data as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [node.module or ""] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            found.append(node.attr)
        elif isinstance(node, ast.Call):
            found += _call(node)
    return found


def _call(node: ast.Call) -> list[str]:
    found, function = [], node.func
    if isinstance(function, ast.Name) and function.id in BUILTINS:
        found.append(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        pair = (function.value.id, function.attr)
        found += [".".join(pair)] if pair in CALLS else []
    if isinstance(function, ast.Attribute) and function.attr in ("import_module", "require"):
        found += [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and a.value in MODULES]
    # A format string that is data is a template language; our own are literals.
    if (
        isinstance(function, ast.Attribute)
        and function.attr in ("format", "format_map")
        and not isinstance(function.value, ast.Constant | ast.JoinedStr)
    ):
        found.append(f"{ast.unparse(function)}(...)")
    for keyword in node.keywords:
        value = keyword.value
        off = isinstance(value, ast.Constant) and value.value is False
        if (
            keyword.arg in ("trust_remote_code", "allow_pickle", "shell", "allow_dangerous_deserialization")
            and not off
        ):
            found.append(f"{keyword.arg}={ast.unparse(value)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_runs_no_data(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    assert set(findings(path.read_text(encoding="utf-8"))) - allowed == set()


# Another library's own rendering, asked for by name; what it would evaluate in an example is refused before (see _site.py).
ALLOWED: dict[str, set[str]] = {
    "integrations/dspy-proxyprompt/src/dspy_proxyprompt/_running.py": {"adapter.format(...)"},
    "integrations/langchain-proxyprompt/src/langchain_proxyprompt/_materialize.py": {"shown.format(...)"},
    "integrations/langchain-proxyprompt/src/langchain_proxyprompt/_site.py": {
        "template.example_prompt.format(...)",
        "string.Formatter",  # its parser only
    },
}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load",
        "import os\nos.system(x)", "eval(x)", "exec(x)", "compile(x, '', 'exec')",
        "torch.load(p)", "np.load(p)", "yaml.load(x)", "auto.from_pretrained(p, trust_remote_code=True)",
        "auto.from_pretrained(p, trust_remote_code=flag)", "subprocess.run(x, shell=True)", "x.__globals__",
        "template.format(x)", "importlib.import_module('pickle')", "__import__(x)",
    ],
)  # fmt: skip
def test_the_test_would_notice(source: str) -> None:
    assert findings(source)


def test_both_trees_are_read() -> None:
    names = {p.relative_to(ROOT).parts[0] for p in FILES}
    assert names == {"src", "integrations"}
    assert len(FILES) > 100
