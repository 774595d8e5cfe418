"""One measurement in a process of its own: wall and CPU seconds, peak memory, the values.

The parent (`measure`) starts a child per measurement, so that a peak belongs to one method alone,
and ends it at a limit of CPU time (other work on the machine changes that least) or memory. The
child (`main`) loads the case, runs the method once on a small case, so that imports and first calls
are not counted, and then runs it with clocks.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300.0
BYTES = 16 * 10**9
REPEATS = 3
ENOUGH = 3.0  # CPU-seconds of a run beyond which it is not repeated


def measure(
    arguments: list[str],
    *,
    threads: int,
    seconds: float = SECONDS,
    memory: int = BYTES,
    module: str = "benchmarks.common.measure",
) -> dict[str, Any]:
    """Runs `python -m module arguments` and returns the row it prints.

    The limit of CPU time counts from the child's line START. status: done, timeout, memory, failed,
    unsupported or not_applicable; reason: one line where it is not done.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=out, stderr=errors, env=environment, cwd=ROOT,
        )  # fmt: skip
        started: float | None = None  # CPU seconds at the line START
        row: dict[str, Any] = {}
        while child.poll() is None:
            time.sleep(0.1)
            if started is None:
                out.seek(0)
                started = _cpu_seconds(child.pid) if "START" in out.read() else None
            if started is not None and _cpu_seconds(child.pid) - started > seconds:
                row = {"status": "timeout", "reason": f"not finished in {seconds:.0f} CPU-seconds"}
                child.kill()
            if not row and _status(child.pid, "VmRSS") > memory:
                row = {"status": "memory", "reason": f"needs more than {memory / 1e9:.0f} GB"}
                child.kill()
        out.seek(0)
        errors.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("{")]
        if not row:
            row = json.loads(lines[-1]) if lines else _broken(errors.read())
    return {**row, "load_before": round(load, 2)}


def _broken(text: str) -> dict[str, Any]:
    """What a child that printed no row died of."""
    lines = text.strip().splitlines()
    last = lines[-1] if lines else "no output"
    if "allocate" in last or "MemoryError" in last:
        return {"status": "memory", "reason": "ran out of memory"}
    return {"status": "failed", "reason": last[:200]}


def _status(pid: int | str, field: str) -> int:
    """Bytes of VmRSS or VmHWM of a process; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def clocked(run: Callable[[], Any], again: Callable[[], None]) -> tuple[Any, dict[str, Any]]:
    """The result of `run`, and wall and CPU seconds (medians) and bytes at the peak.

    again: called before each repetition. peak_bytes is the process's highest resident set during
    the first run; base_bytes what was resident before it.
    """
    base = _status("self", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    walls, cpus, result, peak = [], [], None, 0
    print("START", flush=True)
    for i in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        found = run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        if i == 0:
            result, peak = found, _status("self", "VmHWM")
        if cpus[0] > ENOUGH:
            break
        again()
    return result, {
        "wall_seconds": statistics.median(walls),
        "cpu_seconds": statistics.median(cpus),
        "wall_runs": walls,
        "cpu_runs": cpus,
        "peak_bytes": peak,
        "base_bytes": base,
    }


def main() -> None:
    """A child: case, method, folder of the data ('-': synthetic images), folder of the weights."""
    import dataclasses

    import torch

    # Several libraries make tensors of the default dtype, and fail or round in float32.
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore")
    from benchmarks.common.cases import load
    from benchmarks.common.methods import METHODS, NotApplicable, Unsupported

    name, method, folder, weights = sys.argv[1:5]
    data = None if folder == "-" else Path(folder)
    run = METHODS[method].run
    with contextlib.suppress(Unsupported, NotApplicable):
        run(load("tiny-mlp", None))
    task = load(name, data, Path(weights))
    facts = {"n": task.n, "n_params": task.n_params, "n_rows": task.n_rows}

    def again() -> None:
        nonlocal task
        task = load(name, data, Path(weights))

    try:
        outcome, clock = clocked(lambda: run(task), again)
    except NotApplicable:
        row = {"status": "not_applicable"}
    except Unsupported as reason:
        row = {"status": "unsupported", "reason": str(reason)}
    except (RuntimeError, MemoryError) as error:
        if "allocate" not in str(error) and not isinstance(error, MemoryError):
            raise
        row = {"status": "memory", "reason": "ran out of memory"}
    else:
        row = {"status": "done", **dataclasses.asdict(outcome), **clock}
    print(json.dumps({**row, **facts, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
