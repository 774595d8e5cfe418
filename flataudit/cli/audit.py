"""`flataudit audit`: one audit, printed and logged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flataudit.cli.options import DEVICE, MODEL_URI, TARGET, TRACKING, json_file_option
from flataudit.cli.output import StageDisplay, check_writable, number, written


def audit(
    model_uri: Annotated[str, MODEL_URI],
    train: Annotated[
        str,
        typer.Option(
            help="training data: file.npz (x, y; or y and inputs by name), .csv or .parquet with"
            " --target, module:function, or mlflow (the source run's dataset)",
            show_default=False,
        ),
    ],
    heldout: Annotated[
        str, typer.Option(help="data never used in training: judges calibration")
    ] = "",
    target: Annotated[str, TARGET] = "",
    family: Annotated[
        str, typer.Option(help="auto, categorical, bernoulli, gaussian or poisson")
    ] = "",
    penalty: Annotated[str, typer.Option(help="auto, or the weight decay of the mean loss")] = "",
    dispersion: Annotated[str, typer.Option(help="auto, or the Gaussian variance")] = "",
    training: Annotated[
        str, typer.Option(help="training record: auto (the source run), FILE or KEY=VALUE,...")
    ] = "",
    curvature: Annotated[str, typer.Option(help="ggn")] = "",
    solver: Annotated[
        str,
        typer.Option(
            help="auto, primal or dual (exact), sampling or lanczos (matrix-free), kfac (rough)"
        ),
    ] = "",
    device: Annotated[str, DEVICE] = "",
    sensitivity: Annotated[
        str, typer.Option(help="estimates at a third and three times the penalty: auto, on or off")
    ] = "",
    slices: Annotated[
        str,
        typer.Option(
            help="also give the gap by the values of COLUMN of the training data, or FILE:COLUMN"
        ),
    ] = "",
    config: Annotated[str, typer.Option(help="YAML file of options; the command line wins")] = "",
    json_file: Annotated[str, json_file_option("report")] = "",
    no_log: Annotated[bool, typer.Option("--no-log", help="write nothing to MLflow")] = False,
    deadline: Annotated[
        float | None, typer.Option(help="seconds after which the audit is stopped (default: a day)")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="folder from which a stopped audit with sampling or lanczos goes on")
    ] = "",
    memory_limit: Annotated[
        str,
        typer.Option(
            help="memory beyond which the audit is stopped: bytes, or text such as 8GB (default:"
            " FLATAUDIT_MEMORY_LIMIT, else none)"
        ),
    ] = "",
    tracking_uri: Annotated[str, TRACKING] = "",
) -> None:
    """Predict a model's generalization gap and log it, with its confidence, to MLflow."""
    from flataudit.config import make_options, read_options
    from flataudit.report import terminal
    from flataudit.stages import Stages, estimate, prestart, run_audit

    from_file = read_options(Path(config)) if config else {}
    given = {
        "target": target,
        "family": family,
        "penalty": number(penalty),
        "dispersion": number(dispersion),
        "training": training,
        "curvature": curvature,
        "solver": solver,
        "device": device,
        "sensitivity": sensitivity,
        "slices": slices,
        "deadline": deadline,
        "memory_limit": memory_limit,
        "checkpoint": checkpoint,
        "tracking_uri": tracking_uri,
    }
    given = {key: value for key, value in given.items() if value not in (None, "")}
    options = make_options({**from_file, **given}, "the options")
    check_writable(json_file)
    prestart()
    with StageDisplay() as show:
        stages = Stages(estimate=lambda loaded, values: estimate(loaded, values, show.stage))
        result = run_audit(
            model_uri, train, heldout or None, options, stages=stages, write=not no_log
        )
    report = result["report"]
    if written(report, json_file):
        return
    print(terminal.render(report))
    if result["run_id"]:
        print(f"\nlogged to MLflow: run {result['run_id']} in experiment flataudit")
