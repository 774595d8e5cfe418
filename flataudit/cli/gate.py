"""`flataudit gate`: may this version be promoted?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flataudit.cli.options import MODEL_URI, TRACKING, json_file_option
from flataudit.cli.output import StageDisplay, check_writable, number, table_console, written

if TYPE_CHECKING:
    from flataudit.gate import Decision


def gate(
    model_uri: Annotated[str, MODEL_URI],
    policy: Annotated[str, typer.Option(help="YAML file of rules", show_default=False)],
    alias: Annotated[
        str, typer.Option(help="alias that the version gets if it passes, else nothing is set")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check and record, set nothing, exit 0")
    ] = False,
    override: Annotated[
        str | None,
        typer.Option(help="let it pass all the same, for this reason; recorded with who and when"),
    ] = None,
    json_file: Annotated[str, json_file_option("decision")] = "",
    train: Annotated[
        str,
        typer.Option(
            help="audit the model first if no usable audit is stored: training data as for audit"
        ),
    ] = "",
    heldout: Annotated[str, typer.Option(help="with --train: as for audit")] = "",
    target: Annotated[str, typer.Option(help="with --train: as for audit")] = "",
    training: Annotated[str, typer.Option(help="with --train: as for audit")] = "",
    penalty: Annotated[str, typer.Option(help="with --train: as for audit")] = "",
    config: Annotated[str, typer.Option(help="with --train: YAML file of audit options")] = "",
    deadline: Annotated[float | None, typer.Option(help="with --train: as for audit")] = None,
    tracking_uri: Annotated[str, TRACKING] = "",
) -> None:
    """Hold a model version's latest audit against a policy; exit 0 passed, 1 refused."""
    from flataudit.errors import InputError
    from flataudit.gate import Audit, run_gate
    from flataudit.policy import read_policy

    rules = read_policy(Path(policy))
    options: dict[str, Any] = {
        "target": target,
        "training": training,
        "penalty": number(penalty),
        "deadline": deadline,
    }
    options = {key: value for key, value in options.items() if value not in (None, "")}
    if not train and (options or heldout or config):
        given = [*options, *(["heldout"] if heldout else []), *(["config"] if config else [])]
        raise InputError(
            f"expected --train beside --{given[0]}, got none; give the training data, or leave it"
            " out to decide on the stored audit"
        )
    check_writable(json_file)
    audit = None
    if train:
        from flataudit.config import make_options, read_options

        from_file = read_options(Path(config)) if config else {}
        options = {**from_file, **options, "tracking_uri": tracking_uri}
        audit = Audit(train, heldout or None, make_options(options, "the options"))
    with StageDisplay():
        decision = run_gate(
            model_uri,
            rules,
            alias=alias or None,
            dry_run=dry_run,
            override=override,
            audit=audit,
            policy_file=policy,
            tracking_uri=tracking_uri or None,
        )
    on_stdout = written(decision.to_dict(), json_file)
    if decision.exit_code == 2:
        raise InputError(
            f"expected an audit of {decision.uri}, got none, so the gate refused; run flataudit"
            " audit first, or give --train"
        )
    _show(decision, to_stderr=on_stdout)
    raise typer.Exit(decision.exit_code)


def _show(decision: Decision, *, to_stderr: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from flataudit.records import override_text

    console = table_console(stderr=to_stderr)
    head, style = _headline(decision)
    console.print(f"[{style}]{escape(head)}[/]")
    table = Table(box=None, pad_edge=False)
    for column in ("rule", "value", "threshold", "", ""):
        table.add_column(column, overflow="fold")
    for rule in decision.rules:
        outcome = "skipped" if rule.skipped else "passed" if rule.passed else "FAILED"
        colour = "dim" if rule.skipped else "green" if rule.passed else "bold red"
        cells = (rule.name, _text(rule.value), _threshold(rule.name, rule.threshold))
        table.add_row(
            *map(escape, cells),
            f"[{colour}]{outcome}[/]",
            escape(rule.message.removeprefix("skipped: ")),
        )
    if decision.rules:
        console.print(table)
    if decision.override:
        console.print(escape(f"overridden: {override_text(decision.to_dict())}"))
    for note in decision.notes:
        console.print(escape(f"note: {note}"))
    if decision.alias and decision.alias_set:
        before = decision.alias["before"]
        was = "was not set" if before is None else f"was version {before}"
        console.print(escape(f"{decision.alias['name']} is now version {decision.version} ({was})"))
    elif decision.alias:
        now = decision.alias["after"]
        stays = "is still not set" if now is None else f"is still version {now}"
        console.print(escape(f"{decision.alias['name']} {stays}"))
    console.print(escape(f"recorded in MLflow: run {decision.gate_run_id} in flataudit-gates"))


def _headline(decision: Decision) -> tuple[str, str]:
    if decision.mode == "disabled":
        return f"{decision.uri}: not checked (disabled)", "bold yellow"
    if decision.override:
        return f"{decision.uri}: REFUSED, let through by override", "bold yellow"
    word = "PASS" if decision.outcome == "pass" else "REFUSED"
    dry = " (dry run)" if decision.mode == "dry_run" else ""
    return f"{decision.uri}: {word}{dry}", "bold green" if word == "PASS" else "bold red"


def _threshold(name: str, value: Any) -> str:
    signs = {"min_predicted_accuracy": ">= ", "calibration": "", "confidence": ""}
    return "" if value is None else signs.get(name, "<= ") + _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, int | float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)
