"""The exact gap estimates against every peer: error, time and peak memory on the same problems.

    pip install -e '.[peers]'
    python benchmarks/peers.py [--data FOLDER] [--cases NAME ...] [--methods NAME ...] [--again]

Each measurement runs in a process of its own, with the same weights, penalty, float64 and threads,
and is ended at 300 CPU-seconds or 16 GB: 'not finished' is a result. Rows are written one by one to
benchmarks/peers.json; what is there already, of the same weights, is not measured again without
--again. Networks are trained once and kept in the folder of --weights. Fashion-MNIST's
idx files are read from FOLDER (Debian: `apt-get install dataset-fashion-mnist`).
docs/performance.md reads the result; `python benchmarks/performance_page.py` renders its tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.cases import CASES, DATA, PENALTY, load
from benchmarks.common.machine import machine
from benchmarks.common.measure import BYTES, SECONDS, measure
from benchmarks.common.methods import METHODS

RESULT = Path(__file__).parent / "peers.json"
PUBLISHED = [name for name in CASES if not name.startswith("tiny-")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=PUBLISHED)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--weights", type=Path, help="keeps the trained networks between runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    result = json.loads(given.out.read_text()) if given.out.exists() else {"rows": []}
    described = machine(given.threads)
    torch.set_num_threads(given.threads)  # of the training, in this process
    if result["rows"] and result["machine"] != described and not given.again:
        # Not an error: `make bench` goes on to the next benchmark.
        print("The rows there are from another machine or other versions; measure with --again.")
        return
    with tempfile.TemporaryDirectory() as temporary:
        weights = str(given.weights or temporary)
        Path(weights).mkdir(parents=True, exist_ok=True)
        for case in given.cases:
            fingerprint = ""
            for method in given.methods:
                if not _installed(METHODS[method].library):
                    print(f"{case:16} {method:18} not installed: pip install -e '.[peers]'")
                    continue
                if not fingerprint:
                    fingerprint = _fingerprint(load(case, given.data, Path(weights)).model)
                there = [r for r in result["rows"] if (r["case"], r["method"]) == (case, method)]
                if there and not given.again and _holds(there[0], fingerprint):
                    continue
                row = {
                    "case": case,
                    "method": method,
                    "weights": fingerprint,
                    **measure(
                        [case, method, str(given.data), weights],
                        threads=given.threads,
                        seconds=given.seconds,
                    ),
                }
                kept = [r for r in result["rows"] if (r["case"], r["method"]) != (case, method)]
                order = {name: i for i, name in enumerate(CASES)}
                columns = {name: i for i, name in enumerate(METHODS)}
                rows = sorted([*kept, row], key=lambda r: (order[r["case"]], columns[r["method"]]))
                result = {
                    "machine": described,
                    "penalty": PENALTY,
                    "limit_seconds": given.seconds,
                    "limit_bytes": BYTES,
                    "rows": rows,
                }
                given.out.write_text(json.dumps(result, indent=1) + "\n")
                print(_line(row), flush=True)


def _fingerprint(model: torch.nn.Module) -> str:
    """Of the trained weights: rows of one case compare only where it is the same."""
    sha = hashlib.sha256()
    for t in model.state_dict().values():
        sha.update(t.contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]


def _holds(row: dict[str, Any], fingerprint: str) -> bool:
    """Whether a row stands: one that was not finished has no values that weights would change."""
    return row["status"] != "done" or row.get("weights") == fingerprint


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _line(row: dict[str, Any]) -> str:
    head = f"{row['case']:16} {row['method']:18}"
    if row["status"] != "done":
        return f"{head} {row['status']}: {row.get('reason', '')}"
    values = f"soft rank {row['soft_rank']}, tic {row['tic']}, loo {row['loo']}"
    return (
        f"{head} {row['note'] if row['soft_rank'] is None else values};"
        f" {row['wall_seconds']:.2f} s wall, {row['cpu_seconds']:.2f} s CPU,"
        f" {row['peak_bytes'] / 1e9:.2f} GB, load {row['load_before']}"
    )


if __name__ == "__main__":
    main()
