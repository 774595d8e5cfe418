"""`flataudit observe` and `flataudit track-record`: what came true of the predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flataudit.cli.options import DEVICE, MODEL, TARGET, TRACKING, json_file_option
from flataudit.cli.output import (
    StageDisplay,
    check_writable,
    table_console,
    write_whole,
    written,
)


def observe(
    model_uri: Annotated[str, typer.Argument(help="an audited model", show_default=False)],
    heldout: Annotated[
        str,
        typer.Option(
            help="data never used in training, known since the audit: as for audit",
            show_default=False,
        ),
    ],
    target: Annotated[str, TARGET] = "",
    device: Annotated[str, DEVICE] = "auto",
    audit_run: Annotated[
        str, typer.Option(help="an older audit run of the model (default: its latest)")
    ] = "",
    json_file: Annotated[str, json_file_option()] = "",
    tracking_uri: Annotated[str, TRACKING] = "",
) -> None:
    """Measure the held-out loss of an audited model; log the observed gap beside the prediction."""
    from flataudit.observe import observe as run
    from flataudit.report import words

    check_writable(json_file)
    with StageDisplay():
        found = run(
            model_uri,
            heldout,
            target=target or None,
            device=device,
            audit_run_id=audit_run or None,
            tracking_uri=tracking_uri or None,
        )
    if written(found, json_file):
        return
    seen, predicted = found["observed"], found["predicted"]
    gap = words.interval(predicted["gap"], predicted["low"], predicted["high"])
    print(
        f"{found['uri']}: observed on {seen['n']:,} samples, predicted by {predicted['estimator']}"
    )
    print(f"gap        observed {seen['gap']:.4f} +- {seen['se']:.4f}, predicted {gap}")
    print(f"loss       {words.number(seen['nll'])} nats per example")
    if seen["accuracy"] is not None:
        print(f"accuracy   {words.percent(seen['accuracy'])}")
    outcome = {True: "as predicted", False: "NOT as predicted", None: "no interval to hold it to"}
    print(f"outcome    {outcome[found['inside']]}")
    labels = words.fresh_labels_text(found)
    if labels:
        print(f"\n{labels}")
    print(f"\nlogged to MLflow: run {found['observation_run_id']} in flataudit-observations")


def track_record(
    model: Annotated[str, MODEL] = "",
    json_file: Annotated[str, json_file_option()] = "",
    plot: Annotated[str, typer.Option(help="draw it into FILE.png or FILE.svg")] = "",
    tracking_uri: Annotated[str, TRACKING] = "",
) -> None:
    """Predicted gaps against those that occurred: coverage, bias, by estimator and confidence."""
    from flataudit.errors import InputError
    from flataudit.report import track_record as report
    from flataudit.store import use_tracking
    from flataudit.track_record import read_outcomes, summarise

    kind = Path(plot).suffix.lower().removeprefix(".")
    if plot and kind not in ("png", "svg"):
        raise InputError(f"expected --plot FILE.png or FILE.svg, got {plot}; choose one of these")
    for option, file in (("--json", json_file), ("--plot", plot)):
        check_writable(file, option)
    use_tracking(tracking_uri or None)
    record = summarise(read_outcomes(model or None))
    if plot:
        write_whole(plot, report.draw(record, kind), "--plot")
    if written(record, json_file):
        return
    print(report.headline(record))
    if not record["groups"]:
        return
    from rich.markup import escape
    from rich.table import Table

    console = table_console()
    table = Table(box=None, pad_edge=False)
    heads = ("", "gaps", "as predicted", "95 % interval", "observed - predicted", "rmse")
    for index, column in enumerate(heads):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in report.rows(record):
        table.add_row(*map(escape, row))
    console.print()
    console.print(table)
