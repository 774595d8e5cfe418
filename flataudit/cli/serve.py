"""`flataudit serve`: every standing audit of a folder on its schedule, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    folder: Annotated[Path, typer.Argument(help="folder of pipeline files")] = Path("pipelines"),
) -> None:
    """Run the standing audits of a folder by their schedules until interrupted."""
    from flataudit.pipeline import read_folder

    pipelines = read_folder(folder)
    from flows.deployments import serve_all

    serve_all(pipelines)
