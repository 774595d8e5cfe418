"""Every standing audit as a Prefect deployment: by prefect.yaml, or served in one process.

`python -m flows.deployments` writes prefect.yaml from pipelines/*.yaml; then
`prefect deploy --all --no-prompt` deploys each on a process work pool. The deployments name their
pipeline file: what is in it counts when the sweep starts, its schedule when it is deployed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flataudit.errors import InputError, StoreError
from flataudit.pipeline import Pipeline, read_folder
from flows.sweep import sweep_flow

Json = dict[str, Any]

WORK_POOL = "flataudit"
ENTRYPOINT = "flows/sweep.py:sweep_flow"
TAG = "flataudit"
# A sweep that still runs when its next one is due: that one is left out.
ONE_AT_A_TIME = {"limit": 1, "collision_strategy": "CANCEL_NEW"}
HEAD = """\
# The standing audits as Prefect deployments. Made from pipelines/*.yaml; do not edit:
#   python -m flows.deployments
# Then, with PREFECT_API_URL set, from the project's folder:
#   prefect work-pool create --type process flataudit
#   prefect deploy --all --no-prompt
#   prefect worker start --pool flataudit
"""


def deployments(pipelines: Mapping[Path, Pipeline]) -> list[Json]:
    """The deployments as prefect.yaml lists them; paths as they are given."""
    return [
        {
            "name": pipeline.name,
            "description": _description(pipeline),
            "tags": [TAG, *pipeline.tags],
            "entrypoint": ENTRYPOINT,
            "parameters": {"pipeline": path.as_posix()},
            "schedules": _schedules(pipeline),
            "concurrency_limit": dict(ONE_AT_A_TIME),
            "work_pool": {"name": WORK_POOL},
        }
        for path, pipeline in pipelines.items()
    ]


def prefect_yaml(folder: Path = Path("pipelines")) -> str:
    """The text of prefect.yaml for the pipelines of a folder, which is named as given.

    Raises:
        InputError: no pipelines, or a bad file.
    """
    content = {"name": "flataudit", "deployments": deployments(read_folder(folder))}
    return HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def serve_all(pipelines: Mapping[Path, Pipeline]) -> None:
    """Serves every pipeline until the process is interrupted; needs a running Prefect server.

    Raises:
        InputError: no server is named.
        StoreError: the server does not answer.
    """
    from prefect import serve
    from prefect.exceptions import PrefectException
    from prefect.schedules import Cron
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise InputError(
            "expected PREFECT_API_URL to name a Prefect server, which keeps the schedules, got"
            " none; run `prefect server start` and export"
            " PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    served: list[Any] = [
        sweep_flow.to_deployment(
            name=pipeline.name,
            description=_description(pipeline),
            tags=[TAG, *pipeline.tags],
            parameters={"pipeline": str(path.absolute())},
            schedules=[Cron(item["cron"], item["timezone"]) for item in _schedules(pipeline)],
            concurrency_limit=_limit(),
        )
        for path, pipeline in pipelines.items()
    ]
    try:
        serve(*served)
    except (PrefectException, OSError) as error:
        raise StoreError(
            f"could not serve on {PREFECT_API_URL.value()}: {error}; check that the Prefect server"
            " runs"
        ) from error


def _limit() -> Any:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig

    return ConcurrencyLimitConfig.model_validate(ONE_AT_A_TIME)


def _schedules(pipeline: Pipeline) -> list[Json]:
    schedule = pipeline.schedule
    if schedule is None:
        return []
    return [{"cron": schedule.cron, "timezone": schedule.timezone, "active": True}]


def _description(pipeline: Pipeline) -> str:
    models = pipeline.model
    which = {"alias": f"alias {models.alias}", "version": f"version {models.version}"}
    return f"Audits {models.name}, {which.get(models.select, models.select)}."


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "prefect.yaml").write_text(
        prefect_yaml(), encoding="utf-8"
    )
