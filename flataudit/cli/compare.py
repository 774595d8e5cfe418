"""`flataudit compare`: two audited versions side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from flataudit.cli.options import TRACKING, json_file_option
from flataudit.cli.output import check_writable, table_console, write_whole, written


def compare(
    first: Annotated[str, typer.Argument(help="a model, as for audit", show_default=False)],
    second: Annotated[str, typer.Argument(help="another model", show_default=False)],
    html: Annotated[str, typer.Option(help="write the comparison as a page to FILE")] = "",
    json_file: Annotated[str, json_file_option()] = "",
    tracking_uri: Annotated[str, TRACKING] = "",
) -> None:
    """Put the latest audits of two versions side by side, and say which is predicted better."""
    from flataudit.audits import read_report, required_audit
    from flataudit.identity import identify
    from flataudit.report import compare as comparison
    from flataudit.store import use_tracking

    for option, file in (("--html", html), ("--json", json_file)):
        check_writable(file, option)
    use_tracking(tracking_uri or None)
    audits = [required_audit(identify(uri)) for uri in (first, second)]
    reports = [read_report(audit) for audit in audits]
    found = comparison.compare(reports[0], reports[1], (audits[0].uri, audits[1].uri))
    found["audit_run_ids"] = [audit.run_id for audit in audits]
    if html:
        write_whole(html, comparison.render_html(found), "--html")
    if not written(found, json_file):
        _show(found)


def _show(found: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = table_console()
    table = Table(box=None, pad_edge=False)
    for column in ("", *found["names"]):
        table.add_column(escape(column), overflow="fold")
    for row in found["rows"]:
        cells = [escape(row[key]) for key in ("name", "first", "second")]
        table.add_row(*cells, style="" if row["differs"] else "dim")
    console.print(table)
    console.print()
    difference = found["difference"]
    if difference is None:
        console.print(escape(f"not comparable: {found['reason']}"))
        return
    text = f"predicted loss, second minus first: {difference['value']:+.4f}"
    if difference["se"] is not None:
        text += f" [{difference['low']:+.4f}, {difference['high']:+.4f}] for uncorrelated errors"
        if found["same_data"]:
            text += f", [{difference['low_any']:+.4f}, {difference['high_any']:+.4f}] for any"
    console.print(escape(text))
    console.print(escape(difference["sentence"]))
    if not found["same_data"]:
        console.print(escape(f"note: {found['reason']}"))
    if found["same_model"]:
        console.print("note: both are the same logged model")
