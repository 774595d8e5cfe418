"""Scores of everything that was tried, and the rows they come from: research.json.

    python -m benchmarks.zoo.research.summary [--store FOLDER ...] [--draws 400]

With --store (as often as there are stores) the rows are read from those folders, else from
research.json itself, so that every score can be computed again without a model. Rows are rounded
to six digits first. The combinations come from results.parquet alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine
from benchmarks.zoo.grid import grid
from benchmarks.zoo.measure import LIBRARIES, RESULTS
from benchmarks.zoo.research import paths, recalibrate, training
from benchmarks.zoo.research.candidates import (
    COMBINATIONS,
    PATH_RULES,
    SERIES_RULES,
    by_list,
    column,
    factors_of,
    or_loo,
    over_gap,
    recalibrated,
    recalibration_rules,
)
from benchmarks.zoo.research.scoring import (
    LIST,
    bias,
    mean_change,
    out_of_data_set,
    scored,
)
from benchmarks.zoo.rule_fit import branch, criterion
from benchmarks.zoo.rules import (
    LOO,
    Row,
    Rule,
    both,
    decided,
    number,
)
from benchmarks.zoo.scores import read, rounded
from benchmarks.zoo.store import read_rows

Json = dict[str, Any]

OUT = Path(__file__).parents[1] / "research.json"
DIGITS = 6  # significant ones of a row's numbers
DECIMALS = 5  # of a score
SAME = 1e-4  # nats: a network trained again is the zoo's where its training NLL is


# --- combinations of the committed estimates ------------------------------------------------------


def combinations(rows: Sequence[Row], draws: int) -> Json:
    """The open branch by combinations of its estimates, and networks without a record."""
    nets = [row for row in rows if row["architecture"] != "glm"]
    evidence = {
        "soft rank": column("evidence_soft_rank"),
        "loo": column("evidence_loo"),
        "blend": both(column("evidence_soft_rank"), column("evidence_soft_rank_recalibrated")),
        "loo with the record": LOO,
    }
    opened = [row for row in rows if branch(row) == "network"]
    return {
        "models": len(opened),
        "scores": scored(opened, COMBINATIONS, draws),
        "out_of_data_set": out_of_data_set(
            opened, {k: v for k, v in COMBINATIONS.items() if "labels" not in k}, draws
        ),
        "without_record": {
            "models": len(nets),
            "scores": {
                name: {"score": criterion(nets, rule), "bias": bias(nets, rule)}
                for name, rule in evidence.items()
            },
        },
        "by_share_of_decay": by_share_of_decay(nets),
        "by_optimizer": by_optimizer(opened, draws),
    }


def by_optimizer(rows: Sequence[Row], draws: int) -> Json:
    """The list's open branch by optimizer."""
    kinds = {"sgd": ("sgd",), "adam": ("adam",), "adamw": ("adamw",), "both": ("adam", "adamw")}
    rules = {name: COMBINATIONS[name] for name in (LIST, "soft rank", "recalibrated", "loo")}
    return {
        kind: {"models": len(of), "scores": scored(of, rules, draws)}
        for kind, names in kinds.items()
        if (of := [row for row in rows if row["optimizer"] in names and branch(row) == "network"])
    }


def by_share_of_decay(nets: Sequence[Row]) -> Json:
    """The list's bias by the share of weight decay in D."""
    found = {}
    for low, high in ((0.0, 0.02), (0.02, 0.1), (0.1, 0.3), (0.3, 0.7), (0.7, 1.01)):
        of = [
            row
            for row in nets
            if (whole := number(row, "record_penalty"))
            and low <= (number(row, "decay_penalty") or 0.0) / whole < high
        ]
        found[f"{low:g} to {min(high, 1):g}"] = {"models": len(of), "bias": bias(of, by_list)}
    return found


# --- recalibration --------------------------------------------------------------------------------


def recalibration(rows: Sequence[Row], draws: int) -> Json:
    """Every recalibration on the open branch; out of data set among those without labels."""
    free: dict[str, Rule] = {LIST: by_list} | recalibration_rules("loo")
    other: dict[str, Rule] = {
        "loo_recalibrated": or_loo("loo_recalibrated"),
        "tic_recalibrated": or_loo("tic_recalibrated"),
        "undone": or_loo("undone"),
        "200 held-out labels": column("held_gap"),
    }
    labelled = recalibration_rules("heldout") | recalibration_rules("test")
    with_labels = {LIST: by_list} | recalibration_rules("heldout")
    return {
        "models": len(rows),
        "scores": scored(rows, free | other | labelled, draws),
        "out_of_data_set": out_of_data_set(rows, free, draws),
        "out_of_data_set, 200 labels": out_of_data_set(rows, with_labels, draws),
        "temperature of 200 labels minus their gap": scored(
            rows,
            {
                LIST: column("held_gap"),
                "blend": recalibrated("heldout_temperature", blended=True),
            },
            draws,
        )["blend"]["minus_list"],
    }


# --- schedules, batches and the path --------------------------------------------------------------


def of_the_zoo(rows: Sequence[Row], draws: int) -> Json:
    """The path's estimates on the zoo's networks, which were trained again."""
    regimes = {
        "all": list(rows),
        "sgd": [row for row in rows if row["optimizer"] == "sgd"],
        "adam and adamw": [row for row in rows if row["optimizer"] != "sgd"],
        "saturated": [row for row in rows if row["by_loo_saturated"]],
        "not saturated": [row for row in rows if not row["by_loo_saturated"]],
        "mlp": [row for row in rows if row["architecture"] == "mlp"],
        "other architectures": [row for row in rows if row["architecture"] != "mlp"],
    } | by_ratio(rows)
    return {
        "models": len(rows),
        "regimes": by_regime(regimes, PATH_RULES, draws),
    }


def by_regime(regimes: Mapping[str, Sequence[Row]], rules: Mapping[str, Rule], draws: int) -> Json:
    """Scores of the rules, and of their choice on the other data sets, where there are networks."""
    return {
        name: {
            "models": len(of),
            "scores": scored(of, rules, draws),
            "out_of_data_set": out_of_data_set(of, rules, draws),
        }
        for name, of in regimes.items()
        if of
    }


def by_ratio(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The networks by n over their soft rank."""
    found: dict[str, list[Row]] = {}
    for low, high in ((0.0, 2.0), (2.0, 5.0), (5.0, math.inf)):
        found[f"n from {low:g} to {high:g} soft ranks"] = [
            row for row in rows if low <= 1.0 / row["record_soft_rank"] < high
        ]
    return found


def is_series(row: Row) -> bool:
    return str(row["block"]).startswith("series")


def effects(rows: Sequence[Row], draws: int) -> Json:
    """What a schedule and a batch size change at equal time, within groups.

    By schedule against constant, and by batch against BATCH: the mean log ratio of the true gaps,
    and of estimate/gap.
    """
    series = [row for row in rows if is_series(row)]
    base = {
        row["group"]: row
        for row in series
        if row["schedule"] == "constant" and row["batch_size"] == training.BATCH
    }
    values: dict[str, Any] = {"gap": column("gap")} | {
        f"{name}/gap": over_gap(SERIES_RULES[name])
        for name in (LIST, "soft rank", "loo", "blend", "path")
    }
    found: Json = {}
    for what in (*training.SCHEDULES[1:], *map(kind_of_batch, training.BATCHES)):
        pairs = [
            (base[row["group"]], row)
            for row in series
            if row["group"] in base and what in (row["schedule"], batch_of(row))
        ]
        found[what] = {name: mean_change(pairs, value, draws) for name, value in values.items()}
    return found


def kind_of_batch(size: int) -> str:
    return f"batch {size or 'all'}"


def batch_of(row: Row) -> str:
    size = row["batch_size"]
    return kind_of_batch(0 if size == row["n"] else size)


def series(rows: Sequence[Row], draws: int) -> Json:
    """Part two and three: effects at equal time, factors of the time, and the path's estimates."""
    regimes = {
        "all": list(rows),
        "series": [row for row in rows if is_series(row)],
        "long": [row for row in rows if not is_series(row)],
        "saturated": [row for row in rows if row["by_loo_saturated"]],
        "by the blend": [row for row in rows if row["estimator"] == "soft_rank_blend"],
    } | by_ratio(rows)
    return {
        "models": len(rows),
        "gap_effects": effects(rows, draws),
        "time_factors": {
            f"{name}, {kind}": out_of_data_set(rows, factors_of(name, kind), draws)
            for name in ("soft_rank", "loo", "blend")
            for kind in ("longer", "shorter", "constant")
        },
        "regimes": by_regime(regimes, SERIES_RULES, draws),
    }


# --- rows and the file ----------------------------------------------------------------------------


def tables_of(stores: Sequence[Path]) -> dict[str, list[Json]]:
    """The rows of both passes from the stores, rounded."""
    found: dict[str, list[Json]] = {"recalibration": [], "training": [], "paths": []}
    for store in stores:
        found["recalibration"] += read_rows(store, recalibrate.KIND, grid())
        found["training"] += read_rows(store, training.KIND, training.cells())
        found["paths"] += read_rows(store, paths.KIND, grid())
    return {name: [significant(row) for row in rows] for name, rows in found.items()}


def significant(row: Json) -> Json:
    """Floats with DIGITS significant digits."""
    return {
        key: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
        for key, value in row.items()
    }


def from_file(path: Path) -> dict[str, list[Json]]:
    """The rows that research.json holds."""
    tables = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {
        name: [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        for name, table in tables.items()
    }


def summarise(tables: Mapping[str, Sequence[Json]], measured: Sequence[Row], draws: int) -> Json:
    """All of research.json but the rows."""
    rows = [row for row in measured if number(row, "gap") is not None and decided(row) is not None]
    joined = joined_with(rows, tables["recalibration"])
    retraced = [
        row
        for row in joined_with(rows, tables["paths"])
        if abs(row["own_nll"] - row["train_nll"]) <= SAME
    ]
    found: Json = {"score": "mean over data sets of the mean excess error, capped at log 4"}
    found["combinations"] = combinations(rows, draws)
    if joined:
        found["recalibration"] = recalibration(joined, draws)
    if tables["training"]:
        sgd = [row for row in tables["training"] if row["optimizer"] == "sgd"]
        found["training"] = series(sgd, draws)
        found["by_optimizer"] = by_optimizer(
            [row for row in tables["training"] if row["optimizer"] != "sgd"], draws
        )
    if retraced:
        found["paths"] = of_the_zoo(retraced, draws)
        found["paths"]["trained otherwise"] = len(tables["paths"]) - len(retraced)
    return found


def joined_with(rows: Sequence[Row], more: Sequence[Json]) -> list[Json]:
    """Rows of the open branch with those of a pass, by name."""
    of = {row["name"]: row for row in more}
    return [
        {**row, **of[row["name"]]}
        for row in rows
        if row["name"] in of and branch(row) == "network"
    ]  # fmt: skip


def text_of(found: Json, tables: Mapping[str, Sequence[Json]]) -> str:
    """The file: scores indented, one line per row."""
    parts = [json.dumps(rounded(found, DECIMALS), indent=1, allow_nan=False).removesuffix("\n}")]
    blocks = []
    for name, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = ",\n".join(
            json.dumps([row.get(key) for key in columns], allow_nan=False) for row in rows
        )
        blocks.append(f'  "{name}": {{"columns": {json.dumps(columns)}, "rows": [\n{lines}\n]}}')
    parts.append(',\n "rows": {\n' + ",\n".join(blocks) + "\n }\n}\n")
    return "".join(parts)


def table(scores: Json) -> str:
    """Scores as text, best first."""
    lines = []
    for name, row in sorted(scores.items(), key=lambda item: item[1]["score"]):
        d = row["minus_list"]
        interval = f"{d['value']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"
        lines.append(f"{name:60} {row['score']:.3f}  {row['bias']:+.2f}  {interval}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, action="append", help="folder with rows")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--draws", type=int, default=400, help="of the bootstrap")
    given = parser.parse_args()
    if given.store:
        tables, about = tables_of(given.store), machine(1, (*LIBRARIES, "netcal"))
    else:
        tables = from_file(OUT)
        about = json.loads(OUT.read_text(encoding="utf-8"))["environment"]
    found = {"environment": about} | summarise(tables, read(RESULTS), given.draws)
    given.out.write_text(text_of(found, tables), encoding="utf-8")
    for part in ("combinations", "recalibration"):
        if part in found:
            print(f"{part}: {found[part]['models']} models\n{table(found[part]['scores'])}\n")
    for part in ("training", "paths"):
        for name, regime in found.get(part, {}).get("regimes", {}).items():
            print(f"{part}, {name}: {regime['models']} models\n{table(regime['scores'])}\n")


if __name__ == "__main__":
    main()
