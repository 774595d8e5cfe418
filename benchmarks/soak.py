"""A soak: 200 registered models, 5 % of them broken, and kill -9 of flow, worker and servers.

    python benchmarks/soak.py [--models 200] [--runners processes dask] [--overhead 40]

One sweep over all models under each task runner, with two workers, an MLflow and a Prefect server
as processes of this machine. Three times a process is killed, at moments that are drawn: the flow,
a worker in mid-audit, and a server (MLflow's under processes, Prefect's under Dask). Servers are
started again at once, the sweep whenever it has ended without naming exactly the planted failures.

Then everything is read back from MLflow: every healthy model has exactly one audit run, finished,
with each metric once and all tags on its version; every broken one is named with its reason; no
sweep's run is left RUNNING, no process is left over. Anything else ends with an error.

`--overhead N` measures, without faults and with one worker, what an audit takes beyond the
estimation itself: the time of its task minus `flataudit/duration_seconds`. Results are written to
benchmarks/soak.json, and from there to docs/operations.md; runs that are not asked for keep theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.fleet import PREFIX, TOLD, make_fleet, planted
from benchmarks.common.machine import machine
from benchmarks.common.pages import rendered, software
from benchmarks.common.servers import Process, dask_cluster, mlflow_server, prefect_server
from flataudit.keys import AUDIT_ID, DURATION, EXPERIMENT, RUN_ID, URI_TAG, VERDICT
from flataudit.processes import descendants

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "soak.json"
PAGE = ROOT / "docs" / "operations.md"
RUNNERS = ("processes", "dask")
SHARE = 0.05  # of the models that are broken
WORKERS = 2
SWEEPS = 10  # of which the last has to have finished what the others left
VERSION_TAGS = {
    f"flataudit.{name}"
    for name in ("verdict", "gap", "calibration", "confidence", "warnings", "policy", "run_id",
                 "model_id", "audited_at")
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--runners", nargs="*", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--overhead", type=int, default=40, help="models; 0: not measured")
    parser.add_argument("--deadline", type=float, default=40.0, help="seconds of one audit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fleet", type=Path, help="made here once, and used again")
    parser.add_argument("--work", type=Path, help="stores of the sweeps, kept for --limit")
    parser.add_argument("--limit", type=float, help="seconds; then all is killed, to be continued")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what was started
    if "dask" in given.runners and find_spec("prefect_dask") is None:
        parser.error("expected prefect-dask for --runners dask; pip install 'flataudit[dask]'")
    found: Json = json.loads(given.out.read_text()) if given.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="flataudit-soak-") as folder:
        work = given.work or Path(folder)
        fleet = given.fleet or work / "fleet"
        failures = planted(given.models, SHARE, given.seed)
        if not fleet.exists():
            build(fleet, given.models, failures)
        found["machine"] = described()
        for runner in given.runners:
            soak = Soak(work / runner, fleet, failures, runner, given)
            measured = soak.run()
            if measured is None:
                return say(f"{runner}: stopped at the limit; the same command goes on")
            found[runner] = measured
            given.out.write_text(json.dumps(found, indent=1) + "\n")
        if given.overhead:
            soak = Soak(work / "overhead", fleet, failures, "threads", given)
            found["overhead"] = soak.overhead(given.overhead)
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    if given.out == RESULT:
        PAGE.write_text(published(PAGE.read_text(), found))


def described() -> Json:
    more = {name: version(name) for name in ("mlflow", "prefect", "scikit-learn")}
    if find_spec("prefect_dask"):
        more |= {name: version(name) for name in ("prefect-dask", "distributed")}
    found = machine(1)
    libraries = found["libraries"]
    assert isinstance(libraries, dict)
    return found | {"libraries": libraries | more}


def build(folder: Path, models: int, failures: dict[str, str]) -> None:
    say(f"training {models} models, {len(failures)} of them to be broken")
    folder.mkdir(parents=True)
    url, server = mlflow_server(folder, environment())
    quiet = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_LOGGING_LEVEL": "ERROR"}
    os.environ |= quiet | {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    try:
        make_fleet(url, folder / "artifacts", models, failures)
    finally:
        server.end()


def environment() -> dict[str, str]:
    """For child processes: one thread each, this tree, and no store or server of the caller's."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MLFLOW_", "PREFECT_", "FLATAUDIT_"))
    }
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Soak:
    """One sweep, its servers and its workers, in a folder with a copy of the fleet."""

    def __init__(
        self, folder: Path, fleet: Path, failures: dict[str, str], runner: str, given: Any
    ) -> None:
        if not folder.exists():
            shutil.copytree(fleet, folder)
            (folder / "prefect").mkdir()
        self.state = folder / "state.json"  # of a soak that was stopped at its limit
        self.before: Json = {"seconds": 0.0, "faults": [], "sweeps": [], "stops": 0}
        if self.state.exists():
            self.before = json.loads(self.state.read_text())
        self.folder, self.failures, self.runner, self.given = folder, failures, runner, given
        self.random = random.Random(f"{given.seed} {runner}")
        env = environment()
        self.url, self.mlflow = mlflow_server(folder, env)
        self.api, self.prefect = prefect_server(folder / "prefect", env)
        self.env = env | {
            "MLFLOW_TRACKING_URI": self.url, "PREFECT_API_URL": self.api,
            "PREFECT_HOME": str(folder / "home"), "FLATAUDIT_TASK_RUNNER": runner,
            "FLATAUDIT_WORKERS": "1" if runner == "threads" else str(WORKERS),
        }  # fmt: skip
        self.cluster: list[Process] = []
        if runner == "dask":
            address, self.cluster = dask_cluster(folder, self.env, WORKERS)
            self.env["FLATAUDIT_DASK_ADDRESS"] = address
        from mlflow import MlflowClient

        # Straight to the database: the server is killed now and then.
        self.client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        self.left_over: set[int] = set()
        self.started = time.monotonic()

    def run(self) -> Json | None:
        """The sweep with its faults; what was measured, once all has been checked.

        None where it was stopped at the limit: everything is killed at once, one more fault.
        """
        healthy = self.given.models - len(self.failures)
        told, sweeps = self.before["faults"], self.before["sweeps"]
        faults = self.drawn(healthy)[len(told) :]
        try:
            flow = self.flow(PREFIX + "*")
            while True:
                if not flow.running():
                    sweeps.append(self.ended(flow))
                    say(f"{self.runner}: sweep {len(sweeps)}: {sweeps[-1]}")
                    if not faults and sweeps[-1]["complete"]:
                        break
                    assert len(sweeps) < SWEEPS, flow.tail()
                    flow = self.flow(PREFIX + "*")
                if faults and len(self.audits("FINISHED")) >= faults[0]["finished"]:
                    time.sleep(faults[0]["delay"])
                    done = self.kill(faults[0], flow)
                    if done is not None:
                        told.append(done)
                        del faults[0]
                        say(f"{self.runner}: {done}")
                if self.given.limit and time.monotonic() - self.started > self.given.limit:
                    stopped = {"seconds": self.seconds(), "stops": self.before["stops"] + 1}
                    self.state.write_text(json.dumps(stopped | {"faults": told, "sweeps": sweeps}))
                    return None
                time.sleep(0.5)
            seconds = self.seconds()
            checked = self.check(sweeps)
            tasks = self.tasks()
        finally:
            flow.kill()
            self.end()
        return {
            "models": self.given.models, "broken": self.failures, "workers": WORKERS,
            "sweeps": sweeps, "faults": told, "checked": checked,
            "stopped_as_a_whole": self.before["stops"],
            "seconds": round(seconds, 1), "audits_per_minute": round(60 * healthy / seconds, 1),
            "audit": self.summary(tasks),
        }  # fmt: skip

    def overhead(self, models: int) -> Json:
        """One sweep over the first models, without faults, one audit at a time."""
        try:
            assert models in range(10, 101, 10), "expected 10, 20, ... or 100 models"
            flow = self.flow(f"{PREFIX}0[0-{models // 10 - 1}][0-9]")
            while flow.running():
                time.sleep(0.2)
            row = self.ended(flow)
            tasks = self.tasks()
        finally:
            self.end()
        # The first audit of a process starts the server that forks: it is not warm.
        return {
            "models": models, "workers": 1, "sweep": row, "audit": self.summary(tasks[1:]),
        }  # fmt: skip

    def seconds(self) -> float:
        return float(self.before["seconds"]) + time.monotonic() - self.started

    # --- the faults ---

    def drawn(self, healthy: int) -> list[Json]:
        """What is killed, after how many finished audits and how many more seconds."""
        targets = ["flow", "worker", "prefect" if self.runner == "dask" else "mlflow"]
        self.random.shuffle(targets)
        shares = sorted(self.random.uniform(0.05, 0.85) for _ in targets)
        return [
            {"kill": target, "finished": int(healthy * share),
             "delay": round(self.random.uniform(0, 3), 2)}
            for target, share in zip(targets, shares, strict=True)
        ]  # fmt: skip

    def kill(self, fault: Json, flow: Process) -> Json | None:
        """What was killed and when; None where no worker, or no flow, is there to be killed."""
        after = round(self.seconds(), 1)
        pids = [flow.process.pid, *(worker.process.pid for worker in self.cluster[1:])]
        workers = [pid for of in pids for pid in descendants(of) if _is_worker(pid)]
        if fault["kill"] == "flow":
            if not flow.running():
                return None
            self.left_over |= set(descendants(flow.process.pid))
            os.kill(flow.process.pid, signal.SIGKILL)  # and not its group: workers end themselves
        elif fault["kill"] == "worker":
            if not workers:
                return None
            chosen = self.random.choice(workers)
            self.left_over |= {chosen, *descendants(chosen)}
            os.kill(chosen, signal.SIGKILL)
        else:
            server = self.mlflow if fault["kill"] == "mlflow" else self.prefect
            server.kill()
            server.start()
        return {"kill": fault["kill"], "after_audits": len(self.audits("FINISHED")),
                "after_seconds": after}  # fmt: skip

    # --- the sweep ---

    def flow(self, models: str) -> Process:
        pipeline = {
            "name": "soak", "model": {"name": models, "select": "all"},
            "data": {"train": "mlflow"}, "deadline": self.given.deadline,
        }  # fmt: skip
        path, out = self.folder / "soak.yaml", self.folder / "rows.json"
        path.write_text(json.dumps(pipeline))
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "flataudit", "run", str(path), "--json", str(out)]
        return Process(command, self.folder / "flow.log", self.env)

    def ended(self, flow: Process) -> Json:
        """How the sweep's process ended; complete: its failures are the planted ones."""
        out = self.folder / "rows.json"
        if not out.exists():
            return {"exit": flow.process.returncode, "complete": False}
        (result,) = json.loads(out.read_text())
        failed = {row["model"]: row["error"] for row in result["rows"] if row["state"] == "failed"}
        expected = {f"models:/{name}/1": TOLD[kind] for name, kind in self.failures.items()}
        named = all(text in failed.get(uri, "") for uri, text in expected.items())
        others = {uri: text for uri, text in failed.items() if uri not in expected}
        found = {
            "exit": flow.process.returncode, **result["counts"],
            "complete": named and not others,
        }  # fmt: skip
        return found | ({"others": sorted(others.values())[:2]} if others else {})

    def audits(self, status: str | None = None) -> list[Any]:
        """The audit runs of all sweeps, in MLflow."""
        where = self.client.get_experiment_by_name(EXPERIMENT)
        if where is None:
            return []
        wanted = "" if status is None else f"attributes.status = '{status}'"
        runs = self.client.search_runs([where.experiment_id], wanted, max_results=10_000)
        return [run for run in runs if URI_TAG in run.data.tags]

    # --- what is read back ---

    def check(self, sweeps: list[Json]) -> Json:
        """Raises where anything was lost, half-written or done twice."""
        names = [f"{PREFIX}{n:03d}" for n in range(self.given.models)]
        healthy = [name for name in names if name not in self.failures]
        found: dict[str, list[Any]] = {}
        for run in self.audits():
            found.setdefault(run.data.tags[URI_TAG], []).append(run)
        keys, late = set(), 0
        for name in healthy:
            runs = found[f"models:/{name}/1"]
            (run,) = [run for run in runs if run.info.status != "FAILED"]
            late += len(runs) - 1  # past the deadline in one sweep, audited by the next
            tags = self.client.get_model_version(name, "1").tags
            assert run.info.status == "FINISHED", name
            assert set(tags) == VERSION_TAGS, (name, tags)
            assert tags[RUN_ID] == run.info.run_id, name
            assert tags[VERDICT] == run.data.tags[VERDICT], name
            for key in run.data.metrics:
                assert len(self.client.get_metric_history(run.info.run_id, key)) == 1, (name, key)
            assert "flataudit/gap" in run.data.metrics, name
            assert DURATION in run.data.metrics, name
            assert list(self.folder.rglob(f"{run.info.run_id}/artifacts/flataudit/report.html"))
            keys.add(run.data.tags["flataudit.audit_key"])
            assert AUDIT_ID in run.data.tags, name
        assert len(keys) == len(healthy)
        for name in self.failures:  # no number for any of them
            for run in found.get(f"models:/{name}/1", []):
                assert run.info.status == "FAILED", name
                assert "flataudit/gap" not in run.data.metrics, name
        where = self.client.get_experiment_by_name(EXPERIMENT)
        assert where is not None
        runs = self.client.search_runs([where.experiment_id], max_results=10_000)
        states = [run.info.status for run in runs if URI_TAG not in run.data.tags]
        assert "RUNNING" not in states, states
        until = time.monotonic() + 60
        while left := [pid for pid in self.left_over if Path(f"/proc/{pid}/cmdline").exists()]:
            assert time.monotonic() < until, left
            time.sleep(0.5)
        audited = sum(sweep.get("audited", 0) for sweep in sweeps)
        return {
            "healthy_audited_once": len(healthy), "failures_named": len(self.failures),
            "sweep_runs": sorted(states), "late_and_again": late,
            "audited_by_sweeps_that_ended": audited,
        }  # fmt: skip

    def tasks(self) -> list[tuple[float, float]]:
        """Seconds of each audit's task, and of its estimation, in the order of their start."""
        from prefect.client.orchestration import SyncPrefectClient

        time.sleep(5)  # the last task runs reach the server a little after the flow has ended
        took: dict[str, tuple[Any, float]] = {}
        with SyncPrefectClient(self.api) as api:
            offset = 0
            while page := api.read_task_runs(limit=200, offset=offset):
                offset += len(page)
                for task in page:
                    if task.name.startswith("audit models:/") and task.state.is_completed():
                        uri = task.name.removeprefix("audit ")
                        seconds = task.total_run_time.total_seconds()
                        # A skipped model is a task too, a short one: the longest is its audit.
                        if uri not in took or seconds > took[uri][1]:
                            took[uri] = (task.start_time, seconds)
        estimation = {
            run.data.tags[URI_TAG]: run.data.metrics[DURATION] for run in self.audits("FINISHED")
        }
        known = sorted((start, seconds, uri) for uri, (start, seconds) in took.items())
        return [(seconds, estimation[uri]) for _, seconds, uri in known if uri in estimation]

    def summary(self, tasks: list[tuple[float, float]]) -> Json:
        over = sorted(task - estimation for task, estimation in tasks)
        return {
            "measured": len(tasks),
            "task_seconds": round(statistics.median(task for task, _ in tasks), 2),
            "estimation_seconds": round(statistics.median(e for _, e in tasks), 2),
            "overhead_seconds": round(statistics.median(over), 2),
            "overhead_seconds_p90": round(over[int(0.9 * len(over))], 2),
        }

    def end(self) -> None:
        for process in (*self.cluster, self.mlflow, self.prefect):
            process.end()


def _is_worker(pid: int) -> bool:
    """Whether it is a process of a pool, or of a Dask worker below its nanny."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def published(page: str, found: Json) -> str:
    """The page with the soak's table made anew."""
    on = found["machine"]
    told = f"{on['processor']}, {on['cores']} cores, {on['memory_gib']} GiB; {software(on)}."
    return rendered(page, lambda name: f"{table(found)}\n\n{told}")


def table(found: Json) -> str:
    lines = [
        "| | processes | Dask | one worker, no faults |",
        "|---|---|---|---|",
    ]
    runs = [found.get(name) for name in (*RUNNERS, "overhead")]

    def row(title: str, of: Any) -> None:
        cells = []
        for run in runs:
            try:
                cells.append(str(of(run)))
            except (KeyError, TypeError):
                cells.append("")
        lines.append(f"| {title} | {' | '.join(cells)} |")

    row("models", lambda run: run["models"])
    row("of them broken", lambda run: len(run["broken"]))
    row(
        "killed (after finished audits)",
        lambda run: ", ".join(f"{f['kill']} ({f['after_audits']})" for f in run["faults"]),
    )
    row("stopped as a whole, and gone on", lambda run: run["stopped_as_a_whole"])
    row("sweeps until all was done", lambda run: len(run["sweeps"]))
    row("healthy models audited exactly once", lambda run: run["checked"]["healthy_audited_once"])
    row("failures named", lambda run: run["checked"]["failures_named"])
    row("seconds in all", lambda run: f"{run['seconds']:.0f}")
    row("audits per minute, faults included", lambda run: run["audits_per_minute"])
    row("estimation, s (median)", lambda run: run["audit"]["estimation_seconds"])
    row("overhead per audit, s (median)", lambda run: run["audit"]["overhead_seconds"])
    row("overhead per audit, s (90th percentile)",
        lambda run: run["audit"]["overhead_seconds_p90"])  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
