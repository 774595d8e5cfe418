"""`flataudit run`: the standing audits of pipelines/, planned or run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flataudit.cli.options import TRACKING, json_file_option
from flataudit.cli.output import StageDisplay, check_writable, table_console, written

if TYPE_CHECKING:
    from flataudit.pipeline import Pipeline

Json = dict[str, Any]


def run(
    files: Annotated[
        list[Path],
        typer.Argument(help="pipeline files, as pipelines/NAME.yaml", show_default=False),
    ],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print what would be audited, its size and about how long"),
    ] = False,
    json_file: Annotated[str, json_file_option()] = "",
    tracking_uri: Annotated[str, TRACKING] = "",
) -> None:
    """Run standing audits through their Prefect flow: every version that each file matches."""
    from flataudit.pipeline import check_names, read_pipeline

    pipelines = {path: read_pipeline(path) for path in files}
    check_names(pipelines)
    check_writable(json_file)
    if tracking_uri:
        # Audits may run in other processes; those of this machine inherit the variable.
        os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    results = [(_plan if dry_run else _sweep)(pipeline) for pipeline in pipelines.values()]
    if not written(results, json_file):
        for result in results:
            _show(result, dry_run)
    if any(row["state"] == "failed" for result in results for row in result["rows"]):
        raise typer.Exit(3)


def _sweep(pipeline: Pipeline) -> Json:
    with StageDisplay() as show:
        show.stage(f"{pipeline.name}: starting Prefect")
        from flows.sweep import sweep_flow

        show.stage(f"{pipeline.name}: auditing {pipeline.model.name}, {pipeline.model.select}")
        found: Any = sweep_flow(pipeline.to_dict())
    return dict(found)


def _plan(pipeline: Pipeline) -> Json:
    from flataudit.store import use_tracking
    from flataudit.sweeps import select_versions

    use_tracking()
    rows = []
    with StageDisplay() as show:
        show.stage(f"{pipeline.name}: looking up versions")
        versions = select_versions(pipeline.model)
        for done, version in enumerate(versions):
            show.stage(f"{pipeline.name}: planning {version.uri} ({done} of {len(versions)})")
            rows.append(_planned(version.uri, pipeline))
    schedule = pipeline.schedule
    return {
        "pipeline": pipeline.name,
        "next_run": None if schedule is None else schedule.next_run().isoformat(),
        "rows": rows,
    }


def _planned(uri: str, pipeline: Pipeline) -> Json:
    """One version's row; what an audit would refuse is a failed row, not the end of the plan."""
    from flataudit import stages, sweeps
    from flataudit.audit_key import key_of
    from flataudit.errors import FlatauditError, StoreError
    from flataudit.models.registry import ModelSource
    from flataudit.planning import plan_audit

    options, data = pipeline.audit_options(), pipeline.data
    row: Json = {"model": uri, "state": "planned", "run_id": None, "plan": None, "error": None}
    try:
        loaded = stages.load(uri, data.train, data.heldout, options.model_dump())
        source = ModelSource.from_dict(loaded["source"])
        done = sweeps.audited_run(key_of(loaded, options), source)
        if done is not None:
            return row | {"state": "skipped", "run_id": done}
        return row | {"plan": plan_audit(loaded, options).to_dict()}
    except StoreError:
        raise
    except FlatauditError as error:
        return row | {"state": "failed", "error": str(error)}


# --- what is printed ----------------------------------------------------------------------------


def _show(result: Json, dry_run: bool) -> None:
    from rich import box
    from rich.table import Table

    console = table_console(soft_wrap=False)
    counts = _counts(result["rows"])
    head = f"{result['pipeline']}: {counts}"
    if result.get("next_run"):
        head += f"; next by schedule {result['next_run'].replace('T', ' ')}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns, cells = _PLANNED if dry_run else _AUDITED
    table.add_column("model", no_wrap=True)
    for title, right in columns:
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in result["rows"]:
        table.add_row(row["model"].removeprefix("models:/"), *cells(row))
    console.print(head, soft_wrap=True, markup=False)
    if result["rows"]:
        console.print(table)
    for row in result["rows"]:
        if row["error"]:
            console.print(f"{row['model']}: {row['error']}", soft_wrap=True, markup=False)
    if dry_run:
        _show_total(console, result["rows"])
    elif result["rows"]:
        console.print(f"logged to MLflow: run {result['run_id']} in experiment flataudit")


def _counts(rows: list[Json]) -> str:
    found: dict[str, int] = {}
    for row in rows:
        found[row["state"]] = found.get(row["state"], 0) + 1
    told = [f"{number} {_STATES.get(state, state)}" for state, number in sorted(found.items())]
    return ", ".join(told) or "no version to audit"


def _show_total(console: Any, rows: list[Json]) -> None:
    plans = [row["plan"] for row in rows if row["plan"]]
    known = [plan["minutes"] for plan in plans if plan["minutes"] is not None]
    if known:
        more = "" if len(known) == len(plans) else f" and {len(plans) - len(known)} of unknown time"
        console.print(
            f"about {_minutes(sum(known))} min one after the other{more}; nothing was run"
        )


def _planned_cells(row: Json) -> list[str]:
    from flataudit.memory import human

    plan = row["plan"]
    if plan is None:
        return [_state(row), "", "", "", "", ""]
    return [
        _state(row),
        f"{plan['n_samples']:,}",
        f"{plan['n_params']:,}",
        plan["solver"],
        human(plan["bytes"]),
        "unknown" if plan["minutes"] is None else _minutes(plan["minutes"]),
    ]


def _audited_cells(row: Json) -> list[str]:
    gap = "" if row["gap"] is None else f"{row['gap']:.3f}"
    ends = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
    state = _state(row)
    return [state, row["verdict"] or "", gap, ends, row["confidence"] or "", seconds]


def _minutes(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def _state(row: Json) -> str:
    state = str(row["state"])
    return _STATES.get(state, state)


_STATES = {"planned": "to audit", "skipped": "audited already"}
_PLANNED = (
    (("state", False), ("samples", True), ("parameters", True), ("solver", False),
     ("memory", True), ("minutes", True)),
    _planned_cells,
)  # fmt: skip
_AUDITED = (
    (("state", False), ("verdict", False), ("gap", True), ("90 % interval", False),
     ("rely on it", False), ("seconds", True)),
    _audited_cells,
)  # fmt: skip
