"""``proxyprompt ledger``: parses and prints only."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import InputError

if TYPE_CHECKING:
    from .ledger import Ledger, Totals

__all__ = ["ledger_group"]

_KEY_FILE = click.option(
    "--key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the secret, for a ledger with store = hash or encrypted.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
_PATH = click.argument("path", type=click.Path(path_type=Path))


def open_ledger(path: Path, key_file: Path | None) -> Ledger:
    """The ledger at ``path``, which may be a run's output folder; never made."""
    from .ledger import Ledger

    return Ledger(path / "ledger.db" if path.is_dir() else path, create=False, key_file=key_file)


@click.group(name="ledger")
def ledger_group() -> None:
    """Look after a ledger: what was bought, whether it is sound, a copy as text; PATH is the file or its folder."""


@ledger_group.command(name="list")
@_PATH
@_KEY_FILE
@_JSON
def list_runs(path: Path, key_file: Path | None, as_json: bool) -> None:
    """List the runs: calls, tokens, money."""
    with open_ledger(path, key_file) as ledger:
        runs, everything = ledger.runs(), ledger.totals()
        if as_json:
            rows = [
                {"run": r.run, "started_at": r.started_at, "last_at": r.last_at, **_plain(r.totals)}
                for r in runs
            ]
            _print_json(
                {"path": str(ledger.path), "store": ledger.store, "runs": rows, "all": _plain(everything)}
            )
            return
        _say(f"{ledger.path} (store: {ledger.store})")
        for one in runs:
            _say(f"{one.run}  {_day(one.started_at)} to {_day(one.last_at)}")
            for line in _lines(one.totals):
                _say(f"    {line}")
        if not runs:
            _say("no calls")


@ledger_group.command()
@_PATH
@click.argument("wanted")
@_KEY_FILE
@_JSON
def show(path: Path, wanted: str, key_file: Path | None, as_json: bool) -> None:
    """Show the answers and calls whose key begins with WANTED, or the calls of the run WANTED."""
    from . import ledger_care

    with open_ledger(path, key_file) as ledger:
        rows = ledger_care.show(ledger, wanted)
    if not rows:
        raise InputError(f"Nothing in {path} has the key or the run {wanted!r}.")
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        _say(f"{row['kind']} {row['key'][:16]}")
        for name, value in row.items():
            if name not in ("kind", "key") and value is not None:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                _say(f"    {name}: {text}")


@ledger_group.command()
@_PATH
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write; else standard output."
)
@click.option("--run", help="Only this run.")
@_KEY_FILE
def export(path: Path, out: Path | None, run: str | None, key_file: Path | None) -> None:
    """Write everything as JSON Lines, decrypted; a file is readable by its owner only."""
    from . import ledger_care
    from .data import write_private

    with open_ledger(path, key_file) as ledger:
        lines = [json.dumps(row, ensure_ascii=True) for row in ledger_care.export_rows(ledger, run=run)]
    text = "".join(line + "\n" for line in lines)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_private(out, text)
        _say(f"{len(lines)} rows in {out}", err=True)


@ledger_group.command()
@_PATH
@_KEY_FILE
@_JSON
def verify(path: Path, key_file: Path | None, as_json: bool) -> None:
    """Check every row; exit with 6 if anything is damaged. Changes nothing."""
    from . import ledger_care

    with open_ledger(path, key_file) as ledger:
        found = ledger_care.verify(ledger)
    if as_json:
        damage = [{"table": d.table, "row": d.row, "problem": d.problem} for d in found.damage]
        counted = {"answers": found.answers, "calls": found.calls, "quarantined": found.quarantined}
        _print_json({"sound": found.sound, **counted, "damage": damage})
    else:
        for one in found.damage:
            _say(f"{one.table} row {one.row}: {one.problem}" if one.row else f"{one.table}: {one.problem}")
        _say(
            f"{found.answers} answers and {found.calls} calls checked; {len(found.damage)} damaged,"
            f" {found.quarantined} set aside earlier"
        )
    if not found.sound:
        sys.exit(6)


@ledger_group.command()
@_PATH
@click.option("--run", "runs", multiple=True, help="All calls of this run; may be given more than once.")
@click.option("--before", help="All calls made before this day (YYYY-MM-DD, UTC).")
@click.option("--quarantine", is_flag=True, help="What was set aside as damaged.")
@click.option("--backups", is_flag=True, help="Also the copies made before a migration.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_KEY_FILE
@_JSON
def prune(
    path: Path,
    runs: tuple[str, ...],
    before: str | None,
    quarantine: bool,
    backups: bool,
    yes: bool,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Remove what is named, for good: answers that were paid for have to be bought again."""
    from . import ledger_care

    moment = None if before is None else _moment(before)
    with open_ledger(path, key_file) as ledger:
        copies = ledger_care.backups(ledger)
        ways: dict[str, Any] = {"runs": runs, "before": moment, "quarantine": quarantine}
        nothing = ledger_care.Pruned(0, 0, 0)
        only_copies = backups and not (runs or quarantine) and before is None
        found = nothing if only_copies else ledger_care.prune(ledger, **ways, dry=True)
        gone = copies if backups else []
        what = f"{found.calls} calls, {found.answers} answers, {found.quarantined} rows set aside, {len(gone)} backups"
        if not yes and not click.confirm(f"Remove {what} from {_visible(str(ledger.path))}?", err=True):
            _say("Nothing was removed.", err=True)
            sys.exit(1)
        if not only_copies:
            found = ledger_care.prune(ledger, **ways)
        for copy in gone:
            copy.unlink()
    if as_json:
        removed = {"calls": found.calls, "answers": found.answers, "quarantined": found.quarantined}
        _print_json({**removed, "backups": [str(copy) for copy in gone]})
    else:
        _say(f"Removed {what}.")
    for copy in [] if backups else copies:
        _say(f"{copy} still holds what was there before a migration (--backups removes it).", err=True)


def _moment(day: str) -> float:
    try:
        return datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise InputError(f"--before: got {day!r}; a day is written YYYY-MM-DD.") from error


def _plain(totals: Totals) -> dict[str, Any]:
    return {
        "done": totals.done,
        "failed": totals.failed,
        "unknown": totals.unknown,
        "open": totals.open,
        "taken_over": totals.taken_over,
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "cached_tokens": totals.cached_tokens,
        "money": {currency: str(amount) for currency, amount in totals.money.items()},
        "models": {name: _plain(one) for name, one in totals.by_model.items()},
    }


def _lines(totals: Totals) -> list[str]:
    lines = []
    for model, one in totals.by_model.items():
        states = [
            ("done", one.done),
            ("failed", one.failed),
            ("outcome unknown", one.unknown),
            ("open", one.open),
            ("taken over", one.taken_over),
        ]
        calls = ", ".join(f"{n:,} {name}" for name, n in states if n) or "0 done"
        money = "".join(f"; {_short(amount)} {currency}" for currency, amount in one.money.items())
        lines.append(f"{model}: {calls}; {one.prompt_tokens:,} + {one.completion_tokens:,} tokens{money}")
    return lines


def _short(amount: Decimal) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.6f}"


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(moment))


def _visible(text: str) -> str:
    from .report._text import one_line, visible

    return visible(one_line(text))


def _say(text: str, *, err: bool = False) -> None:
    # Models, runs and answers are other people's words: no control character of theirs reaches the terminal.
    indent = text[: len(text) - len(text.lstrip())]
    click.echo(indent + _visible(text), err=err)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=True))
