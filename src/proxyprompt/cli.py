"""The command line: parses and prints only.

Exit codes
----------
0
    Finished. The verdict is in the output; ``--strict`` turns "not certified" into 5.
2
    Usage, configuration, data or model name: nothing was loaded or sent.
3
    A budget would have been passed. What was answered is in the ledger.
4
    A model failed, or too many answers are missing. Run again to go on.
5
    Finished, nothing certified (with ``--strict`` only).
6
    The ledger cannot be used.
130
    Interrupted. Run the same command to go on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._ledger_commands import ledger_group
from ._version import __version__
from .errors import (
    BackendError,
    BudgetExceededError,
    InconclusiveError,
    InputError,
    LedgerError,
    MissingDependencyError,
    ProxyPromptError,
)

if TYPE_CHECKING:
    from .artifact import Artifact
    from .config import RunConfig
    from .ledger import CallRole, Ledger

__all__ = ["main"]

_EXIT: tuple[tuple[type[Exception], int], ...] = (
    (BudgetExceededError, 3),
    (InconclusiveError, 4),
    (BackendError, 4),
    (LedgerError, 6),
    (InputError, 2),
    (MissingDependencyError, 2),
)
_EPILOG = "Exit codes: 0 finished, 2 input, 3 budget, 4 model, 5 not certified (--strict), 6 ledger, 130 interrupted."


@click.group(epilog=_EPILOG)
@click.version_option(__version__, prog_name="proxyprompt")
def main() -> None:
    """Cut few-shot prompts: keep what earns its tokens on the deployed model, with a certificate and a bill."""


@main.command(epilog=_EPILOG)
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Output folder; overrides the config."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.option("--strict", is_flag=True, help="Exit with 5 when no smaller prompt is certified.")
@click.option(
    "--check", "check_only", is_flag=True, help="Check the configuration and its data; load and send nothing."
)
def run(config: Path, out: Path | None, as_json: bool, strict: bool, check_only: bool) -> None:
    """Run CONFIG (TOML): screen, attribute, clean, compress, certify; write artifact and report."""
    from .config import load_config

    with _errors():
        checked = load_config(config, output=out)
        if check_only:
            _say(_plan(checked))
            _say(_power(checked))
            return
        _execute(checked, as_json=as_json, strict=strict)


@main.command(epilog=_EPILOG)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-out"), show_default=True,
    help="Output folder.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def demo(out: Path, as_json: bool) -> None:
    """Run the built-in example on two small models that come with pip: no key, no account, no download."""
    from .demo import backdrop, demo_config

    with _errors():
        config = demo_config(out)
        _say(_plan(config))

        def before(ledger: Any, watch: Any) -> None:
            watch.stage("backdrop", "What the mislabelled demonstrations do")
            for row in backdrop(config, ledger, watch):
                watch.note(
                    f"{row.model}: accuracy {row.zero_shot:.0%} without demonstrations, {row.shipped:.0%} with the"
                    f" prompt as it is, {row.corrected:.0%} with its labels put right ({row.n_queries} queries)"
                )

        _execute(config, as_json=as_json, before=before)


@main.command(epilog=_EPILOG)
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Output folder; overrides the config."
)
@click.option("--json", "as_json", is_flag=True, help="Print the estimate as JSON on standard output.")
def estimate(config: Path, out: Path | None, as_json: bool) -> None:
    """Say what the run of CONFIG will still ask and cost, stage by stage; send nothing, load no weights.

    What the ledger in the output folder already holds is subtracted.
    """
    from .config import load_config
    from .estimate import estimate_run

    with _errors(), ExitStack() as stack:
        checked = load_config(config, output=out)
        recorded = checked.output / "ledger.db"
        ledger = stack.enter_context(_ledger(checked, checked.output)) if recorded.exists() else None
        found = estimate_run(
            checked.prompt,
            checked.task,
            checked.splits,
            target=checked.target,
            proxies=checked.proxies,
            settings=checked.settings,
            ledger=ledger,
        )
        if as_json:
            click.echo(json.dumps(found.to_dict(), ensure_ascii=True))
            return
        _say(_plan(checked))
        from .report.estimate import print_estimate

        print_estimate(found)


@main.command(epilog=_EPILOG)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("queries", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Output folder of the run; overrides the config.",
)
@click.option("--level", type=float, default=0.05, show_default=True, help="False-alarm rate.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON on standard output.")
def explains(config: Path, queries: Path, out: Path | None, level: float, as_json: bool) -> None:
    """Is the target's output on each of QUERIES what the stored explanation predicts, or an anomaly?

    Needs the artifact of a finished run of CONFIG in which the target explained itself. Two calls a query: the original
    prompt with all demonstrations, and with none.
    """
    from .config import load_config
    from .data import load_queries
    from .explains import check_queries

    with _errors():
        checked = load_config(config, output=out)
        new = [query for query, _ in load_queries(queries)]
        with _interruptible(checked.output), _ledger(checked, checked.output) as ledger:
            verdicts = check_queries(
                checked.output / "artifact.json",
                checked.prompt,
                checked.task,
                new,
                checked.target,
                ledger,
                level=level,
            )
        if as_json:
            click.echo(json.dumps([asdict(v) for v in verdicts], ensure_ascii=True))
            return
        for v in verdicts:
            click.echo(
                f"{v.verdict:>9}  {v.query}: the demonstrations change the value by {-v.observed[-1]:+.3f}, expected"
                f" {-v.expected[-1]:+.3f}; p = {v.p_value:.3f}"
            )
        odd = sum(not v.explained for v in verdicts)
        _say(
            f"{odd} of {len(verdicts)} are anomalies; of queries like the explained ones, {level:.0%} would be."
        )


@main.command(epilog=_EPILOG)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("queries", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Output folder; overrides the config."
)
@click.option("--units", type=click.Choice(["sentences", "words"]), default="sentences", show_default=True)
@click.option(
    "--learn", type=int, default=0, show_default=True,
    help="Queries measured in full, to learn when the others may stop; 22 are the least that teach.",
)  # fmt: skip
@click.option("--top", type=int, default=2, show_default=True, help="Units measured where nothing is learnt.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def queries(
    config: Path, queries: Path, out: Path | None, units: str, learn: int, top: int, as_json: bool
) -> None:
    """Which sentence or word of each of QUERIES decides the target's answer?

    The proxies of CONFIG propose, the target measures. Writes queries.html and queries.md,
    which show apart what was measured and what is estimated.
    """
    from ._query_command import verify_from_config, write_queries
    from .config import load_config
    from .data import load_queries
    from .outputs import prepare_folder
    from .report import render_queries_markdown
    from .report._text import visible

    with _errors():
        checked = load_config(config, output=out)
        asked = [query for query, _ in load_queries(queries)]
        folder = prepare_folder(checked.output)
        with _interruptible(folder), _ledger(checked, folder) as ledger:
            found = verify_from_config(checked, asked, ledger, units=units, learn=learn, top=top)  # type: ignore[arg-type]
        paths = write_queries(found, folder)
        if as_json:
            click.echo(json.dumps(found.to_dict(), ensure_ascii=True))
            return
        click.echo(visible(render_queries_markdown(found.to_dict())))
        for name, path in paths.items():
            click.echo(visible(f"{name:>9}  {path}"))


@main.command(epilog=_EPILOG)
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Output folder; overrides the config."
)
@click.option(
    "--cancel", is_flag=True, help="Stop those at work; forget those that the provider does not know."
)
@click.option("--json", "as_json", is_flag=True, help="Print the batches as JSON on standard output.")
def batches(config: Path, out: Path | None, cancel: bool, as_json: bool) -> None:
    """Where do the batches stand that the run of CONFIG has sent and not collected?

    Costs nothing. The next run collects what is ready, also of those that were cancelled.
    """
    from .config import load_config
    from .metering import Meter

    with _errors(), ExitStack() as stack:
        checked = load_config(config, output=out)
        found = []
        if (checked.output / "ledger.db").exists():
            ledger = stack.enter_context(_ledger(checked, checked.output))
            for backend in (checked.target, *checked.proxies):
                role: CallRole = "target" if backend is checked.target else "proxy"
                meter = Meter(backend, ledger, role=role, run="batches")
                stopped = set(meter.cancel_batches()) if cancel else set()
                found += [(backend.name, one, one.id in stopped) for one in meter.batches()]
        if as_json:
            rows = [{"model": name, **asdict(one), "cancelled_now": now} for name, one, now in found]
            click.echo(json.dumps(rows, ensure_ascii=True))
            return
        for name, one, now in found:
            day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(one.created))
            state = f"{one.status} (asked to stop)" if now else one.status
            _tell(
                f"{name}  {one.id or '-'}  {state}, of {day} UTC: {one.n_left} of {one.n_requests} to collect"
            )
        if not found:
            _tell("no batches to collect")


class _Ours(click.Group):
    """A group whose commands end with our exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        with _errors():
            return super().invoke(ctx)


main.add_command(_Ours(name="ledger", commands=ledger_group.commands, help=ledger_group.help, epilog=_EPILOG))


def _execute(
    config: RunConfig,
    *,
    as_json: bool,
    strict: bool = False,
    before: Callable[[Any, Any], None] | None = None,
) -> None:
    from .backends.embedded import EmbeddedBackend
    from .outputs import prepare_folder, write_outputs
    from .pipeline import optimize_prompt
    from .summary import build_artifact

    folder = prepare_folder(config.output)
    started = time.monotonic()
    with _interruptible(folder), _ledger(config, folder) as ledger, _Watch() as watch:
        for backend in (config.target, *config.proxies):
            if isinstance(backend, EmbeddedBackend):
                backend.progress = watch.note
        if before is not None:
            before(ledger, watch)
        result = optimize_prompt(
            config.prompt,
            config.task,
            config.splits,
            target=config.target,
            proxies=config.proxies,
            settings=config.settings,
            ledger=ledger,
            observer=watch,
            title=config.title,
            notes=config.notes,
        )
        artifact = build_artifact(result, report_text=config.report_text)
        paths = write_outputs(artifact, folder)
    _show(artifact, {k: str(v) for k, v in paths.items()}, as_json=as_json)
    _say(f"Done in {time.monotonic() - started:.0f} s.")
    if strict and not (artifact.certified and artifact.removed):
        sys.exit(5)


def _ledger(config: RunConfig, folder: Path) -> Ledger:
    from .ledger import Ledger

    return Ledger(folder / "ledger.db", store=config.store, key_file=config.key_file)


def _show(artifact: Artifact, paths: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"files": paths, **artifact.body}, ensure_ascii=True))
        return
    from .report import print_terminal
    from .report._text import visible

    print_terminal(artifact.summary)
    for name, path in paths.items():
        click.echo(visible(f"{name:>9}  {path}"))


def _plan(config: RunConfig) -> str:
    sizes = ", ".join(f"{len(q)} {name}" for name, q in config.splits.items())
    proxies = ", ".join(p.name for p in config.proxies) or "none"
    lines = [
        f"{config.title}: {config.prompt.n_units} demonstrations; queries: {sizes}",
        f"target {config.target.name}; proxies: {proxies}; output {config.output}",
        *(f"note: {note}" for note in config.notes),
    ]
    return "\n".join(lines)


def _power(config: RunConfig) -> str:
    from ._shrinking import plan

    return plan(config.settings, config.task, len(config.splits["sealed"]))


def _tell(text: str) -> None:
    from .report._text import visible

    click.echo(visible(text))


def _say(text: str) -> None:
    from .report._text import visible

    # Messages quote ids, titles and paths, and these may be somebody else's.
    click.echo(visible(text), err=True)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn every error of ours into its message and exit code; others keep their traceback."""
    try:
        yield
    except ProxyPromptError as error:
        code = next((code for kind, code in _EXIT if isinstance(error, kind)), 1)
        _say(f"Error: {error}")
        sys.exit(code)


@contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say(
            f"\nStopped. Everything answered so far is in {folder / 'ledger.db'}; run the same command to go on."
        )
        sys.exit(130)


class _Watch:
    """Draws progress on standard error: bars on a terminal, a line per stage elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, soft_wrap=True)
        self._bars = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("calls"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bar: Any = None
        self._stage = ""
        self._tokens = 0
        self._start = self._told = time.monotonic()

    def __enter__(self) -> _Watch:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage(self, name: str, text: str) -> None:
        self._print(f"{name}: {text}", style="bold")
        self._stage, self._tokens = name, 0
        self._start = self._told = time.monotonic()

    def note(self, text: str) -> None:
        self._print(f"  {text}")

    def tokens(self, n: int) -> None:
        self._tokens += n
        self._bars.refresh()

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        speed = (
            f"{self._tokens:,} tokens, {self._tokens / max(now - self._start, 1e-9):,.0f}/s"
            if self._tokens
            else ""
        )
        if self._console.is_terminal:
            if self._bar is None or self._bars.tasks[self._bar].total != total:
                if self._bar is not None:
                    self._bars.remove_task(self._bar)
                self._bar = self._bars.add_task(self._stage, total=total, speed=speed)
            self._bars.update(self._bar, completed=done, description=self._stage, speed=speed)
        elif now - self._told > 15 and done < total:
            self._told = now
            self._print(f"  {done} of {total} calls; {speed}")

    def _print(self, text: str, style: str | None = None) -> None:
        from .report._text import visible

        self._console.print(visible(text), style=style, highlight=False, markup=False)
