"""Imports point down. The order is that of docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "proxyprompt"
LEVEL: dict[str, float] = {
    "_version": 0,
    "errors": 0,
    "_require": 1,
    "_demonstration_turns": 2,
    "_provider_caching": 2,
    "_segments": 2,
    "coalitions": 2,
    "prices": 2,
    "_trinomial": 3,
    "attribution": 3,
    "_noninferiority": 4,
    "_certifiable": 4.5,
    "_bets": 3,
    "_sequential_rules": 4,
    "agreement": 4,
    "fidelity": 4,
    "testing": 4,
    "backends": 5,
    "report": 5,
    "sequential": 5,
    "embedding": 6,
    "money": 6,
    "_prompt_template": 5.5,
    "prompt": 6,
    "program": 7,
    "savings": 7,
    "task": 7,
    "units": 7,
    "_ledger_calls": 7.2,
    "_ledger_schema": 7.5,
    "_ledger_vault": 7.5,
    "_ledger_owners": 7.5,
    "_ledger_rows": 7.5,
    "_ledger_commit": 7.5,
    "_ledger_sync": 7.5,
    "_token_bounds": 7.5,
    "_ledger_accounts": 8,
    "_ledger_answers": 8.2,
    "_ledger_file": 8,
    "_request_keys": 8,
    "data": 8,
    "_journal": 9.5,
    "ledger": 9,
    "_purchase": 9.5,
    "_call_amounts": 9.7,
    "ledger_care": 9.5,
    "_query_use": 10,
    "metering": 10,
    "value_function": 11,
    "_screening_noise": 11.5,
    "_screening_pairs": 12,
    "_screening_result": 12,
    "_screening_plan": 12.5,
    "explanation": 12,
    "verifying": 13,
    "optimize": 13,
    "screening": 13,
    "settings": 13,
    "_run": 14,
    "models": 14,
    "_cost_reduction": 17,
    "_oracle_size": 14.5,
    "_explaining": 15,
    "_shrinking": 15,
    "_verify_stage": 15.5,
    "config": 15,
    "pipeline": 16,
    "_estimate_loads": 16.2,
    "_estimate_plan": 16.3,
    "estimate": 16.5,
    "_summary_shrinking": 17,
    "artifact": 17,
    "_pruned_requests": 18,
    "explains": 18,
    "_summary_cost": 17.8,
    "_summary_screening": 17.8,
    "summary": 18,
    "messages": 19,
    "openai_client": 19,
    "outputs": 19,
    "demo": 20,
    "_ledger_commands": 20,
    "_query_command": 20,
    "cli": 21,
}
ARRAYS_ONLY = (
    "coalitions",
    "attribution",
    "fidelity",
    "agreement",
    "sequential",
    "_sequential_rules",
    "_bets",
    "_noninferiority",
    "_certifiable",
    "_trinomial",
    "testing",
)


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.name != "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms that a module imports, at any depth of the code; string annotations and TYPE_CHECKING count too."""
    found = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [*base, *(node.module.split(".") if node.module else [])]
            found |= {names[0]} if names else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("proxyprompt."):
            found.add(node.module.split(".")[1])
    return found - {room(path)}


# The prompt's from_dict reads rows with the reader of data.py, and tasks score with the encoder; both inside functions.
ALLOWED = {("prompt", "data")}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert room(path) in LEVEL, f"{path.name} has no place in the architecture"
    up = {r for r in imports(path) if LEVEL[r] >= LEVEL[room(path)] and (room(path), r) not in ALLOWED}
    assert not up, f"{path.relative_to(ROOT)} imports {sorted(up)} from its own level or above"


@pytest.mark.parametrize("path", [p for p in modules() if room(p) in ARRAYS_ONLY], ids=lambda p: p.name)
def test_estimators_see_arrays_only(path: Path) -> None:
    assert not imports(path) & {"backends", "prompt", "task", "data", "ledger", "value_function", "config"}
