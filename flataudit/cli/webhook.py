"""`flataudit webhook`: a receiver of MLflow's webhooks that starts an audit of each new version."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Audit each new version: receive MLflow's webhooks and start audits.")

_NAME = Annotated[str, typer.Option(help="the webhook's name in MLflow")]
_TRACKING = Annotated[str, typer.Option(help="MLflow server (default: MLFLOW_TRACKING_URI)")]


@app.command()
def serve(
    train: Annotated[
        str, typer.Option(help="training data of each version, as in flataudit audit")
    ] = "mlflow",
    config: Annotated[str, typer.Option(help="YAML file of options of the audits")] = "",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 4300,
    deployment: Annotated[
        str,
        typer.Option(help="existing Prefect deployment, FLOW/NAME; default: run the audits here"),
    ] = "",
    limit: Annotated[int, typer.Option(help="audits run here at the same time", min=1)] = 1,
) -> None:
    """Receive MLflow's webhooks at /mlflow and start an audit of each new version."""
    from flataudit.config import read_options
    from flataudit.errors import InputError
    from flataudit.logs import LINE, to_stderr
    from flataudit.webhooks import SECRET_VARIABLE, read_secret

    secret = read_secret()
    # The audits' processes load models, which may run code of whoever logged them.
    os.environ.pop(SECRET_VARIABLE, None)
    options = read_options(Path(config)) if config else {}
    if not (options.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or deployment):
        raise InputError(
            "expected the address of the MLflow server in MLFLOW_TRACKING_URI, got none; the audits"
            " read the new versions there"
        )
    parameters: dict[str, Any] = {"train": train, **options}
    to_stderr("flataudit.webhook", LINE)
    from flows.webhook import PATH, serve

    print(f"flataudit: starting a receiver at http://{host}:{port}{PATH}", file=sys.stderr)
    serve(secret, parameters, host=host, port=port, deployment=deployment or None, limit=limit)


@app.command()
def install(
    url: Annotated[
        str, typer.Argument(help="the receiver: http(s)://HOST:PORT/mlflow", show_default=False)
    ],
    name: _NAME = "flataudit",
    tracking_uri: _TRACKING = "",
    test: Annotated[
        bool, typer.Option("--test", help="let MLflow send a test delivery; 3 where it fails")
    ] = False,
) -> None:
    """Register the receiver with an MLflow server, or bring its registration up to date."""
    from flataudit import webhooks
    from flataudit.errors import StoreError

    secret = webhooks.read_secret()
    done, webhook_id = webhooks.install(url, secret, name=name, tracking_uri=tracking_uri or None)
    print(f"{done} webhook {name} ({webhook_id}): {', '.join(webhooks.EVENTS)} -> {url}")
    print("MLflow keeps its list of webhooks for a minute: versions until then may be missed")
    if test:
        arrived, line = webhooks.send_test(webhook_id)
        if not arrived:
            raise StoreError(
                f"expected the receiver to answer MLflow's test delivery, got {line}; is it running"
                " with the same secret, and does the MLflow server admit its address?"
            )
        print(f"test delivery: {line}")


@app.command()
def remove(name: _NAME = "flataudit", tracking_uri: _TRACKING = "") -> None:
    """Delete the webhook of that name from an MLflow server."""
    from flataudit import webhooks

    found = webhooks.remove(name=name, tracking_uri=tracking_uri or None)
    print(f"deleted webhook {name} ({found})" if found else f"no webhook {name}; nothing to do")
