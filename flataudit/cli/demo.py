"""`flataudit demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[
        str, typer.Option(help="where the demo's embedded stores are kept")
    ] = "flataudit-store",
) -> None:
    """Train, register and audit three small networks on real digits; compare with the truth."""
    from flows.demo import run_demo

    run_demo(Path(folder))
