"""Renders what the zoo says: tables and figures of docs/evidence.md.

    python benchmarks/evidence_page.py

Reads results.parquet, scores.json and rule_fit.json of benchmarks/zoo. Writes the blocks between
`<!-- table: NAME -->` and `<!-- end -->` of docs/evidence.md and the figures under docs/images. The
text around the blocks is written by hand.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow.parquet as pq

from benchmarks.common.pages import machine_line, pyplot, rendered, save
from benchmarks.zoo.rules import decided, number, observed
from benchmarks.zoo.scores import FEWEST_GROUPS, OURS, RIVALS, read, with_rules
from flataudit.results import PenaltyInfo
from flataudit.selection import choose_confidence

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "benchmarks" / "zoo"
PAGE = ROOT / "docs" / "evidence.md"
IMAGES = ROOT / "docs" / "images"
NAMES = {
    OURS: "**the audit's choice**",
    "rule_oracle": "nearest of the four, knowing the truth",
    "rule_paper": "soft rank if calibrated, else TIC (the paper)",
    "record_loo": "always leave-one-out",
    "record_soft_rank": "always soft rank",
    "record_tic": "always TIC",
    "record_soft_rank_recalibrated": "always recalibrated soft rank",
    "evidence_soft_rank": "soft rank, no training record",
    "evidence_loo": "leave-one-out, no training record",
    "decay_soft_rank": "soft rank, weight decay alone",
    "decay_loo": "leave-one-out, weight decay alone",
    "held_gap": "*200 held-out labels*",
    "cv_gap": "5-fold cross-validation",
    "aic": "P/n (AIC)",
    "waic": "WAIC's variance",
    "mpe": "memory perturbation (exact curvature)",
    "mpe_kfac": "memory perturbation (KFAC)",
    "randalo": "RandALO (one output)",
    "hessian_trace": "trace of the Hessian",
    "hessian_top": "top eigenvalue of the Hessian",
    "trace_ratio": "tr C/tr F",
    "sam": "sharpness (SAM)",
    "path_norm": "path norm",
    "parameter_norm": "norm of the parameters",
    "n_params": "number of parameters",
    "alpha": "WeightWatcher's alpha",
}
REGIMES = {
    "all": "all",
    "linear": "linear models",
    "nets": "networks",
    "at_minimum": "networks, weight decay is most of the penalty",
    "early_stopped": "networks, training time is most of it",
    "calibrated": "calibrated",
    "under_confident": "under-confident",
    "over_confident": "over-confident",
    "P<N": "P below N",
    "P>N": "P above N",
    "mlp": "MLPs",
    "cnn": "CNNs",
    "resnet": "ResNets (BatchNorm)",
    "transformer": "transformers",
    "called_ok": "called ok",
    "called_low": "called low",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the page is made of: the rows with their rules, their scores, the fit of the rule."""

    rows: Sequence[Json]
    scores: Json
    fit: Json
    environment: Json


def load(folder: Path = ZOO) -> Evidence:
    """The committed results."""
    path = folder / "results.parquet"
    about = json.loads(pq.read_schema(path).metadata[b"flataudit.zoo"])
    scores, fit = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("scores.json", "rule_fit.json")
    )
    return Evidence(with_rules(read(path)), scores, fit, about)


def main() -> None:
    evidence = load()
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), evidence), encoding="utf-8")
    draw_truth(evidence, IMAGES / "evidence_truth.svg")
    draw_errors(evidence, IMAGES / "evidence_errors.svg")
    draw_ranks(evidence, IMAGES / "evidence_ranks.svg")


def render(page: str, evidence: Evidence) -> str:
    """The page with every block made anew."""
    return rendered(page, lambda name: TABLES[name](evidence))


# --- numbers -------------------------------------------------------------------------------------


def of(evidence: Evidence, regime: str, name: str, score: str) -> Json:
    """One score: {value, low, high}; of a column that a regime does not have, without a value."""
    row = evidence.scores.get(regime, {}).get("scores", {}).get(name, {})
    return dict(row.get(score) or {"value": None, "low": None, "high": None})


def ranged(found: Json, shape: Callable[[float], str] = lambda v: f"{v:.2f}") -> str:
    """'0.74 (0.68 to 0.78)'."""
    if found["value"] is None:
        return "-"
    if found["low"] is None or found["high"] is None:
        return shape(found["value"])
    return f"{shape(found['value'])} ({shape(found['low'])} to {shape(found['high'])})"


def plain(found: Json, shape: Callable[[float], str] = lambda v: f"{v:.2f}") -> str:
    """The value alone; '-' where there is none."""
    return "-" if found["value"] is None else shape(found["value"])


def factor(log_error: float) -> str:
    """A log error as a factor.

    >>> factor(math.log(1.5))
    '1.50'
    """
    return f"{math.exp(log_error):.2f}" if log_error < 4 else "over 50"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def points(found: Json) -> str:
    return ranged(found, lambda v: f"{v:.1f}")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


# --- tables --------------------------------------------------------------------------------------


def summary(evidence: Evidence) -> str:
    """The first screen: what a user asks, and what the zoo answers."""

    def ours(regime: str, score: str, shape: Callable[[float], str] = lambda v: f"{v:.2f}") -> str:
        return plain(of(evidence, regime, OURS, score), shape)

    fit, all_ = evidence.fit, evidence.scores["all"]
    said, ok, low = all_["accuracies"], fit["confidence"]["ok"], fit["confidence"]["low"]
    worst = min(
        (name for name in fit["intervals"] if name.startswith("data: ")),
        key=lambda name: fit["intervals"][name]["widened"],
    )
    floor = all_["floor"]
    rows = [
        ("How far off is a predicted gap?",
         f"by a factor of {ours('all', 'error_median', factor)} (median);"
         f" {ours('linear', 'error_median', factor)} for linear models,"
         f" {ours('nets', 'error_median', factor)} for networks. Beyond what the luck of the"
         f" training sample explains: {ours('all', 'excess_median', factor)}"),
        ("May I rank models by it?",
         f"Kendall's tau is {ours('all', 'kendall')}; {ours('linear', 'kendall')} for linear"
         f" models, {ours('nets', 'kendall')} for networks; an estimate wrong by sampling noise"
         f" alone would reach {floor['kendall']:.2f}"),
        ("Does one changed hyper-parameter make it better or worse?",
         f"foreseen rightly in {ours('all', 'sign', percent)} of"
         f" {all_['scores'][OURS]['n_pairs']:,} pairs of models"),
        ("Does the 90 % interval hold the gap?",
         f"in {percent(fit['intervals']['all']['widened'])} of the models, by thresholds from the"
         f" other data sets; worst: {worst.removeprefix('data: ')},"
         f" {percent(fit['intervals'][worst]['widened'])}"),
        ("What does `ok` mean?",
         f"of the models called ok, {percent(ok['right'])} were within a factor 1.5 or within the"
         f" interval (called low: {percent(low['right'])}); {percent(ok['share'])} of the zoo is"
         " called ok"),
        ("How well is unseen accuracy foreseen?",
         f"within {said['record']['accuracy']['value']:.1f} points (median), and confidence minus"
         f" accuracy within {said['record']['confidence_gap']['value']:.1f}, from the training"
         f" data alone; 200 held-out labels: {said['heldout']['accuracy']['value']:.1f} and"
         f" {said['heldout']['confidence_gap']['value']:.1f}"),
        ("And without a training record?",
         "networks' gaps are off by a factor of"
         f" {plain(of(evidence, 'nets', 'evidence_soft_rank', 'error_median'), factor)} (median of"
         " the soft rank), and every one is called low or refused"),
        ("What else could I do?",
         "5-fold cross-validation, at five refits, is off by a factor of"
         f" {plain(of(evidence, 'linear', 'cv_gap', 'error_median'), factor)} on linear models and"
         f" {plain(of(evidence, 'nets', 'cv_gap', 'error_median'), factor)} on networks; 200"
         " held-out labels by"
         f" {plain(of(evidence, 'linear', 'held_gap', 'error_median'), factor)} and"
         f" {plain(of(evidence, 'nets', 'held_gap', 'error_median'), factor)}"),
    ]  # fmt: skip
    return table(("you ask", "the zoo answers"), rows)


@dataclass(frozen=True, slots=True)
class Mark:
    """One mark: what was asked, what was measured, whether it is met, what noise alone allows."""

    what: str
    asked: str
    measured: str
    met: bool
    floor: str = ""


def marks(evidence: Evidence) -> list[Mark]:
    """The marks that were set before the zoo was measured."""
    found = []
    fit, scores = evidence.fit, evidence.scores

    def tau(regime: str, mark: float) -> None:
        score = of(evidence, regime, OURS, "kendall")
        what, floor = f"{REGIMES[regime]}: Kendall's tau", scores[regime]["floor"]["kendall"]
        met = (score["value"] or 0.0) >= mark
        found.append(Mark(what, f"at least {mark:g}", ranged(score), met, f"{floor:.2f}"))

    def error(regime: str, key: str, mark: float, what: str) -> None:
        score = of(evidence, regime, OURS, key)
        met = score["value"] is not None and score["value"] <= mark
        found.append(
            Mark(f"{REGIMES[regime]}: {what}", f"at most {mark:g}", ranged(score), met, "0")
        )

    def off(key: str, what: str) -> None:
        said = scores["nets"]["accuracies"]
        score, labels = said["record"][key], said["heldout"][key]["value"]
        met = score["value"] is not None and score["value"] <= 2.0
        found.append(
            Mark(f"networks: {what}, median error", "at most 2 points", ranged(score), met,
                 f"200 labels: {labels:.2f}")
        )  # fmt: skip

    tau("linear", 0.9)
    error("linear", "excess_median", 0.1, "median relative error beyond sampling noise")
    tau("nets", 0.85)
    error("nets", "excess_median", 0.15, "median error beyond sampling noise")
    error("nets", "excess_p90", 0.4, "90th percentile of it")
    off("accuracy", "predicted accuracy")
    off("confidence_gap", "confidence minus accuracy")
    without = of(evidence, "nets", "evidence_soft_rank", "error_median")
    called = Counter(confidence_without_record(row) for row in kinds(evidence)[1][1])
    near = without["value"] is not None and without["value"] <= math.log(1.5)
    found.append(
        Mark("networks without a training record: median factor", "at most 1.5, or called low",
             f"{ranged(without, factor)}; " + ", ".join(f"{n} {c}" for c, n in called.items()),
             near or not called["ok"])
    )  # fmt: skip
    ok, covered = fit["confidence"]["ok"], fit["intervals"]["all"]["widened"]
    found += [
        Mark("called ok: within a factor 1.5 or in the interval", "at least 90 %",
             f"{100 * ok['right']:.1f} %", ok["right"] >= 0.9),
        Mark("share of the zoo called ok", "at least 50 %", percent(ok["share"]),
             ok["share"] >= 0.5),
        Mark("coverage of the 90 % interval, on data sets not fitted to", "85 to 95 %",
             f"{100 * covered:.1f} %", 0.85 <= covered <= 0.95),
    ]  # fmt: skip
    cv = scores["linear"]["beside"]["cv_gap"]
    level = all(verdict(cv[key], key) != "behind" for key in ("kendall", "excess_median"))
    found.append(
        Mark("linear models: level with 5-fold cross-validation, at one fit", "not behind",
             f"tau {cv['kendall']['ours']:.2f} against {cv['kendall']['theirs']:.2f}, median excess"
             f" {cv['excess_median']['ours']:.2f} against {cv['excess_median']['theirs']:.2f}",
             level)
    )  # fmt: skip
    behind = Counter(
        name(rival)
        for regime in REGIMES
        for rival in by_verdict(evidence, regime).get("behind", ())
    )
    said_where = "; ".join(
        f"{rival} in {n} regime{'s' * (n > 1)}" for rival, n in behind.most_common()
    )
    found.append(
        Mark("ahead of every training-only baseline in every regime", "or said where not",
             f"behind {said_where}; listed below" if behind else "nowhere behind", not behind)
    )  # fmt: skip
    return found


def confidence_without_record(row: Json) -> str:
    """What a model would be called if its penalty were a guess."""
    chosen = decided(row)
    assert chosen is not None
    seen = observed(row, chosen, (row[f"{OURS}_low"], row[f"{OURS}_high"]))
    guessed = PenaltyInfo(None, 0, "evidence", None, None)
    return choose_confidence(replace(seen, penalty=guessed))[0]


def marks_table(evidence: Evidence) -> str:
    rows = [
        (m.what, m.asked, m.measured, m.floor, "met" if m.met else "**missed**")
        for m in marks(evidence)
    ]
    return table(("mark", "asked", "measured (90 % interval)", "noise alone allows", ""), rows)


def name(column: str) -> str:
    return NAMES.get(column, column)


def verdict(found: Json, score: str) -> str:
    """ahead, level or behind: whether the interval of the difference excludes 0.

    Without an interval, for want of groups, the values themselves decide.
    """
    low, high = found["low"], found["high"]
    if low is None or high is None:
        ours, theirs = (math.inf if found[k] is None else found[k] for k in ("ours", "theirs"))
        low = high = 0.0 if ours == theirs else theirs - ours
    if score == "kendall":  # larger is better
        low, high = -high, -low
    return "ahead" if low > 0 else "behind" if high < 0 else "level"


def by_verdict(evidence: Evidence, regime: str) -> dict[str, list[str]]:
    """{ahead|level|behind: rivals}, by their order, and by their errors where they are gaps.

    behind in either is behind; ahead is ahead in one and not behind in the other.
    """
    found: dict[str, list[str]] = {}
    for rival, row in evidence.scores.get(regime, {}).get("beside", {}).items():
        verdicts = {verdict(row[k], k) for k in ("kendall", "excess_median") if k in row}
        at = next(at for at in ("behind", "ahead", "level") if at in verdicts)
        found.setdefault(at, []).append(rival)
    return found


def beside_table(evidence: Evidence) -> str:
    rows = []
    for regime, title in REGIMES.items():
        if regime not in evidence.scores:
            continue
        found = by_verdict(evidence, regime)
        cells = []
        for at in ("behind", "level"):
            cells.append(", ".join(name(rival) for rival in found.get(at, ())) or "none")
        ahead, total = len(found.get("ahead", ())), sum(map(len, found.values()))
        few = evidence.scores[regime]["groups"] < FEWEST_GROUPS
        rows.append(
            (title + " (*)" * few, str(evidence.scores[regime]["n"]), *cells, f"{ahead} of {total}")
        )
    return table(("regime", "models", "behind", "level with", "ahead of"), rows)


def regimes_table(evidence: Evidence) -> str:
    rows = []
    for regime, title in REGIMES.items():
        if regime not in evidence.scores:
            continue
        get = lambda score, r=regime: of(evidence, r, OURS, score)  # noqa: E731
        floor = evidence.scores[regime]["floor"]
        best = floor.get("error_median")
        rows.append(
            (
                title,
                str(evidence.scores[regime]["n"]),
                ranged(get("kendall")),
                plain(get("error_median"), factor),
                plain(get("error_p90"), factor),
                "-" if best is None else factor(best),
                plain(get("excess_median"), factor),
                plain(get("excess_p90"), factor),
                plain(get("coverage"), percent),
            )
        )
    heads = (
        "regime", "models", "Kendall's tau (90 %)", "factor, median", "90th percentile",
        "noise alone, median", "excess, median", "excess, 90th", "in the interval",
    )  # fmt: skip
    return table(heads, rows)


def rivals_table(evidence: Evidence, regime: str) -> str:
    """Every estimate, rule and baseline of a regime, by its excess error; orders last, by tau."""
    rows = []
    scores = evidence.scores[regime]["scores"]

    def key(column: str) -> tuple[float, float]:
        error = of(evidence, regime, column, "excess_median")["value"]
        tau = of(evidence, regime, column, "kendall")["value"]
        infinite = math.inf if column in scores and "excess_median" in scores[column] else math.nan
        lead = error if error is not None else (1e6 if infinite == math.inf else 2e6)
        return lead, -(tau if tau is not None else -1.0)

    for column in sorted((c for c in NAMES if c in scores), key=key):
        get = lambda score, c=column: of(evidence, regime, c, score)  # noqa: E731
        is_gap = "excess_median" in scores[column]
        none = "no gap" if not is_gap else "infinite"
        rows.append(
            (
                name(column),
                str(scores[column]["n"]),
                ranged(get("kendall")),
                plain(get("spearman")),
                plain(get("sign"), percent),
                plain(get("sign_worst"), percent),
                plain(get("information"), lambda v: f"{v:.0f}"),
                plain(get("excess_median")) if get("excess_median")["value"] is not None else none,
                plain(get("excess_p90")) if get("excess_p90")["value"] is not None else none,
            )
        )
    heads = ("estimate", "models", "Kendall's tau (90 %)", "Spearman", "signs right",
             "worst hyper-parameter", "PGDL", "excess, median", "excess, 90th")  # fmt: skip
    return table(heads, rows)


def accuracy_table(evidence: Evidence) -> str:
    rows = []
    for regime, title in REGIMES.items():
        said = evidence.scores.get(regime, {}).get("accuracies")
        if not said or said["record"]["n"] == 0:
            continue
        rows.append(
            (
                title,
                str(said["record"]["n"]),
                *(points(said["record"][key]) for key in ("accuracy", "confidence_gap")),
                *(points(said["heldout"][key]) for key in ("accuracy", "confidence_gap")),
            )
        )
    heads = ("regime", "models", "accuracy", "confidence gap", "accuracy, 200 labels",
             "confidence gap, 200 labels")  # fmt: skip
    return table(heads, rows)


def intervals_table(evidence: Evidence) -> str:
    titles = REGIMES | {"networks": "networks", "saturated": "fitted until the gradients vanish"}
    rows = [
        (titles.get(key, key), str(found["n"]), percent(found["sampling_only"]),
         percent(found["widened"]))
        for key, found in evidence.fit["intervals"].items()
    ]  # fmt: skip
    return table(("models", "n", "sampling error alone", "widened, out of data set"), rows)


def signs_table(evidence: Evidence) -> str:
    """Sign accuracy by the hyper-parameter that differs: ours beside a few."""
    columns = (OURS, "cv_gap", "held_gap", "parameter_norm", "sam")
    scores = evidence.scores["all"]["scores"]
    keys = [k for k in scores[OURS]["sign_by_hyperparameter"] if k not in ("worst", "all")]
    rows = []
    for key in keys:
        cells = []
        for column in columns:
            value = scores.get(column, {}).get("sign_by_hyperparameter", {}).get(key)
            cells.append("-" if value is None else percent(value))
        rows.append((key.replace("_", " "), *cells))
    return table(("hyper-parameter", *(name(column) for column in columns)), rows)


def environment_line(evidence: Evidence) -> str:
    groups = len({row["group"] for row in evidence.rows})
    tests = sorted({row["n_test"] for row in evidence.rows})
    return (
        f"{len(evidence.rows)} models in {groups} groups that share training samples, on"
        f" {len({row['data'] for row in evidence.rows})} data sets; test pools of {tests[0]:,} to"
        f" {tests[-1]:,} samples. Models in {evidence.environment['models']}."
        f" {machine_line(evidence.environment)}"
    )


TABLES: Mapping[str, Callable[[Evidence], str]] = {
    "summary": summary,
    "marks": marks_table,
    "beside": beside_table,
    "regimes": regimes_table,
    "linear": lambda e: rivals_table(e, "linear"),
    "nets": lambda e: rivals_table(e, "nets"),
    "accuracy": accuracy_table,
    "intervals": intervals_table,
    "signs": signs_table,
    "environment": environment_line,
}


# --- figures -------------------------------------------------------------------------------------

COLOURS = {"ours": "#0b69a8", "low": "#e39a1f", "rival": "#8a949e", "held": "#c2331b"}
SMALLEST = 0.004  # nats: the left end of the picture


def kinds(evidence: Evidence) -> list[tuple[str, list[Json]]]:
    """The rows of linear models and of networks."""
    linear = [row for row in evidence.rows if row["architecture"] == "glm"]
    nets = [row for row in evidence.rows if row["architecture"] != "glm"]
    return [("linear models", linear), ("networks", nets)]


def draw_truth(evidence: Evidence, path: Path) -> None:
    """The predicted gap against the true one, log-log, by confidence; below 0: at the rim."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 4.3), sharex=True, sharey=True,
                                constrained_layout=True)  # fmt: skip
    for axis, (title, rows) in zip(axes, kinds(evidence), strict=True):
        ends = (SMALLEST * 0.8, 12.0)
        axis.fill_between(ends, [v / 1.5 for v in ends], [v * 1.5 for v in ends], color="#e8edf1",
                          lw=0, label="within a factor 1.5")  # fmt: skip
        axis.plot(ends, ends, color="#5a6672", lw=0.8)
        for confidence, colour, marker in (
            ("low", COLOURS["low"], "s"),
            ("ok", COLOURS["ours"], "o"),
        ):
            some = [row for row in rows if row["by_loo_confidence"] == confidence]
            x = [max(row["gap"], SMALLEST) for row in some]
            y = [max(row[OURS], SMALLEST) for row in some]
            axis.scatter(x, y, s=11, color=colour, marker=marker, alpha=0.65, lw=0,
                         label=f"called {confidence} ({len(some)})")  # fmt: skip
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=f"{title}, {len(rows)}")
        axis.set_aspect("equal")
        axis.set_xlabel("true gap, nats per example")
        axis.legend(frameon=False, fontsize=8, loc="upper left")
        ticks = (0.01, 0.1, 1.0, 10.0)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].set_ylabel("predicted gap")
    save(figure, path)


def draw_errors(evidence: Evidence, path: Path) -> None:
    """How many models are within a factor: the audit's choice, its rivals, sampling noise alone."""
    import numpy as np

    from benchmarks.zoo.statistics import log_errors

    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.1), sharey=True, constrained_layout=True)
    lines = (
        (OURS, "the audit's choice", COLOURS["ours"], "-", 2.2),
        ("cv_gap", "5-fold cross-validation", "#1b2530", "--", 1.2),
        ("held_gap", "200 held-out labels", COLOURS["held"], "-.", 1.2),
        ("rule_paper", "soft rank if calibrated, else TIC", COLOURS["rival"], "-", 1.2),
    )
    for axis, (title, rows) in zip(axes, kinds(evidence), strict=True):
        gap, noise = (np.array([row[key] for row in rows]) for key in ("gap", "floor"))
        drawn = gap + noise * np.random.default_rng(0).normal(size=(100, len(rows)))
        curves = [(log_errors(drawn, np.tile(gap, (100, 1))).ravel(), "sampling noise alone",
                   "#d5dbe1", "-", 4.0)]  # fmt: skip
        for column, label, colour, style, width in lines:
            kept = [row for row in rows if number(row, column) is not None]
            errors = log_errors([row[column] for row in kept], [row["gap"] for row in kept])
            curves.append((errors, label, colour, style, width))
        for errors, label, colour, style, width in curves:
            values = np.sort(errors[np.isfinite(errors)])
            share = np.arange(1, len(values) + 1) / len(errors)
            axis.plot(np.exp(values), 100 * share, style, color=colour, lw=width, label=label)
        axis.set(xscale="log", xlim=(1.0, 5.0), ylim=(0, 100), title=title)
        axis.minorticks_off()
        axis.set_xticks([1, 1.25, 1.5, 2, 3, 5], ["1", "1.25", "1.5", "2", "3", "5"])
        axis.set_xlabel("off by at most this factor")
        axis.grid(color="#eceff2", lw=0.6)
    axes[0].set_ylabel("% of the models")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)


def draw_ranks(evidence: Evidence, path: Path) -> None:
    """Kendall's tau with its interval: the audit's choice and every baseline."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 4.3), sharey=True, constrained_layout=True)
    columns = [OURS, "record_loo", "record_soft_rank", "record_tic", "held_gap", *RIVALS]
    taus = {c: of(evidence, "nets", c, "kendall")["value"] for c in columns}
    columns.sort(key=lambda c: -2.0 if taus[c] is None else taus[c])
    for axis, regime, title in zip(
        axes, ("linear", "nets"), ("linear models", "networks"), strict=True
    ):
        axis.axvline(0.0, color="#d5dbe1", lw=0.8)
        floor = evidence.scores[regime]["floor"]["kendall"]
        axis.axvline(floor, color="#d5dbe1", lw=4)
        axis.text(floor, len(columns) - 0.4, "noise alone", fontsize=7.5, ha="center",
                  color="#5a6672")  # fmt: skip
        for i, column in enumerate(columns):
            found = of(evidence, regime, column, "kendall")
            if found["value"] is None:
                axis.text(0.02, i, "none", va="center", fontsize=7, color="#8a949e")
                continue
            own = column == OURS
            colour = (
                COLOURS["ours"] if own else COLOURS["held"] if column == "held_gap" else "#5a6672"
            )
            axis.plot([found["low"], found["high"]], [i, i], color=colour, lw=2.4 if own else 1.2)
            axis.plot(found["value"], i, "o", color=colour, ms=5.5 if own else 3.8)
        axis.set(xlim=(-0.65, 1.0), ylim=(-0.8, len(columns) + 0.3), title=title)
        axis.set_xlabel("Kendall's tau with the true gap")
        labels = [name(column).replace("*", "") for column in columns]
        axis.set_yticks(range(len(columns)), labels)
    save(figure, path)


if __name__ == "__main__":
    main()
