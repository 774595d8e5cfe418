"""What a Prefect server says of the flow run that the test has just made."""

from __future__ import annotations

import time
from typing import Any


def newest_run(server: str, flow: str, enough: Any) -> tuple[Any, list[Any]]:
    """The newest run of a flow that has begun, and its task runs, once these are `enough`.

    Runs that a deployment's schedule has planned are newer than all that have begun. Task runs
    reach the server as events, a little after the flow has ended.
    """
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterId,
        FlowRunFilterStartTime,
    )
    from prefect.client.schemas.sorting import FlowRunSort

    with SyncPrefectClient(server) as api:
        (run,) = api.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])),
            flow_run_filter=FlowRunFilter(start_time=FlowRunFilterStartTime(is_null_=False)),
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )
        own = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        for _ in range(60):
            tasks = api.read_task_runs(flow_run_filter=own)
            if enough(tasks):
                break
            time.sleep(0.5)
        return run, tasks
