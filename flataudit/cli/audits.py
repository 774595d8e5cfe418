"""`flataudit audits`: past audits, listed, shown and exported."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flataudit.cli.options import MODEL, TRACKING, json_file_option
from flataudit.cli.output import check_writable, table_console, write_whole, written

if TYPE_CHECKING:
    from flataudit.audits import PastAudit

audits = typer.Typer(
    help="Past audits: list, show, export.", no_args_is_help=True, pretty_exceptions_enable=False
)


@audits.command("list")
def list_audits(
    model: Annotated[str, MODEL] = "",
    limit: Annotated[int, typer.Option(help="at most so many, newest first; 0: all", min=0)] = 20,
    json_file: Annotated[str, json_file_option()] = "",
    tracking_uri: Annotated[str, TRACKING] = "",
) -> None:
    """List audits by model, newest first, with the change of the gap since the one before."""
    found, changes = _read(model, tracking_uri)
    rows = [_values(a, c) for a, c in zip(found, changes, strict=True)][: limit or None]
    if written(rows, json_file):
        return
    if not rows:
        print("no audits" + (f" of {model}" if model else "") + "; see flataudit audit --help")
        return
    from rich.markup import escape
    from rich.table import Table

    console = table_console(width=170)  # whole run ids, for who copies them
    table = Table(box=None, pad_edge=False)
    for column in ("audited (UTC)", "model", "verdict", "gap", "change", "predicted loss",
                   "accuracy", "rely on it", "observed gap", "run"):  # fmt: skip
        table.add_column(column, no_wrap=True)
    for row in _by_model(rows):
        table.add_row(*map(escape, _cells(row)))
    console.print(table)
    left = len(found) - len(rows)
    if left:
        console.print(f"{left} older ones not shown; --limit 0 shows all", style="dim")


@audits.command("show")
def show(
    what: Annotated[
        str,
        typer.Argument(help="an audit run's id, or a model: its latest audit", show_default=False),
    ],
    json_file: Annotated[str, json_file_option()] = "",
    tracking_uri: Annotated[str, TRACKING] = "",
) -> None:
    """Show one past audit's report."""
    from flataudit.audits import audit_of_run, read_report, required_audit
    from flataudit.identity import identify
    from flataudit.report import terminal
    from flataudit.store import use_tracking

    check_writable(json_file)
    use_tracking(tracking_uri or None)
    is_uri = ":" in what or "/" in what
    audit = required_audit(identify(what)) if is_uri else audit_of_run(what)
    report = read_report(audit)
    if written(report, json_file):
        return
    print(f"audit run {audit.run_id}, {audit.audited_at}\n")
    print(terminal.render(report))


@audits.command("export")
def export(
    file: Annotated[str, typer.Argument(help="FILE.json or FILE.csv", show_default=False)],
    model: Annotated[str, MODEL] = "",
    tracking_uri: Annotated[str, TRACKING] = "",
) -> None:
    """Export all audits as JSON or CSV, one row each."""
    from flataudit.errors import InputError

    suffix = Path(file).suffix.lower()
    if suffix not in (".json", ".csv"):
        raise InputError(f"expected FILE.json or FILE.csv, got {file}; choose one of these")
    check_writable(file, "the argument")
    found, changes = _read(model, tracking_uri)
    rows = [_values(a, c) for a, c in zip(found, changes, strict=True)]
    as_json = suffix == ".json"
    text = json.dumps(rows, indent=1, allow_nan=False) + "\n" if as_json else _csv(rows)
    write_whole(file, text, "the argument")
    print(f"{len(rows)} audits in {file}")


def _read(model: str, tracking_uri: str) -> tuple[list[PastAudit], list[float | None]]:
    from flataudit.audits import gap_changes, past_audits
    from flataudit.store import use_tracking

    use_tracking(tracking_uri or None)
    found = past_audits(model or None)
    return found, gap_changes(found)


def _values(audit: PastAudit, change: float | None) -> dict[str, Any]:
    return audit.to_dict() | {"gap_change": change}


def _csv(rows: list[dict[str, Any]]) -> str:
    from flataudit.audits import PastAudit

    out = io.StringIO()
    names = [*PastAudit.__dataclass_fields__, "gap_change"]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "warnings": " ".join(row["warnings"])})
    return out.getvalue()


def _by_model(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of each model together; the model audited last comes first."""
    order: dict[str, int] = {}
    for row in rows:
        order.setdefault(row["name"] or row["identity"], len(order))
    return sorted(rows, key=lambda row: order[row["name"] or row["identity"]])


def _cells(row: dict[str, Any]) -> list[str]:
    from flataudit.report import words

    change = "" if row["gap_change"] is None else f"{row['gap_change']:+.3f}"
    model = f"{row['name']} v{row['version']}" if row["name"] else row["uri"]
    return [
        row["audited_at"][:16].replace("T", " "),
        model,
        row["verdict"],
        words.interval(row["gap"], row["gap_low"], row["gap_high"]),
        change,
        words.number(row["predicted_test_nll"]),
        words.percent(row["predicted_accuracy"]),
        row["confidence"] or words.DASH,
        words.interval(row["heldout_gap"], None, None),
        row["run_id"],
    ]
