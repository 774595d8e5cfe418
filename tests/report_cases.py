"""Made-up but realistic reports, built through the dataclasses so that page and JSON agree."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from flataudit.results import (
    AuditReport,
    AuditWarning,
    Calibration,
    DataInfo,
    Dispersion,
    Estimate,
    Estimates,
    Fit,
    Gap,
    HeldoutFit,
    Interval,
    ModelInfo,
    PenaltyInfo,
    PenaltyPoint,
    Premise,
    Samples,
    Shift,
    SliceRow,
    SliceTable,
    SolverInfo,
)

SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
Made = tuple[dict[str, Any], dict[str, Any]]


def _samples() -> Samples:
    zeros = np.zeros(3)
    return Samples(nll=zeros, leverage=zeros, tic=zeros, loo=zeros)


def _reliability(temperature: float, evidence: str, n: int = 3000, bins: int = 15) -> Any:
    rng = np.random.default_rng(1)
    true = 1 - 0.9 * rng.beta(0.5, 2.2, n)
    conf = true ** (1 / temperature) if temperature != 1 else true
    hit = rng.random(n) < true
    order = np.argsort(conf)
    rows = []
    for part in np.array_split(order, bins):
        c, a = conf[part].mean(), hit[part].mean()
        half = 1.96 * np.sqrt((conf[part] * (1 - conf[part])).sum()) / len(part)
        low, high = float(max(c - half, 0)), float(min(c + half, 1))
        rows.append({"confidence": float(c), "accuracy": float(a), "low": low, "high": high,
                     "count": len(part)})  # fmt: skip
    edges = np.linspace(0, 1, 21)
    right, wrong = np.histogram(conf[hit], edges)[0], np.histogram(conf[~hit], edges)[0]
    bars = [
        {"left": float(lo), "right": float(hi), "right_count": int(r), "wrong_count": int(w)}
        for lo, hi, r, w in zip(edges[:-1], edges[1:], right, wrong, strict=True)
    ]
    return {"kind": "classification", "evidence": evidence, "bins": rows, "histogram": bars,
            "mean_confidence": float(conf.mean()), "accuracy": float(hit.mean())}  # fmt: skip


RANK = 313.8  # of the calibrated report: the area of _spectrum(4.278e4, 2, 4000)


def _spectrum(top: float, power: float, size: int) -> Any:
    index = np.arange(1.0, size + 1)
    ratios = top * index**-power
    leverage = np.sort(np.random.default_rng(2).lognormal(-3, 1, 500))[::-1]
    return {"ratios": ratios.tolist(), "reason": None, "leverage": leverage.tolist()}


def _influence(count: int, real: bool = False) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    rows = []
    for i in range(count):
        label, other = int(rng.integers(10)), int(rng.integers(10))
        size = float(4 * np.exp(-i / 12))
        rows.append({
            "index": int(rng.integers(6000)),
            "label": float(label) + 0.25 if real else label,
            "predicted": float(other) - 0.125 if real else (other if i < 9 else label),
            "leverage": size / 9, "tic": size / 2, "loo": size,
            "nll": float(rng.exponential(0.4)),
        })  # fmt: skip
    return rows


def calibrated_report() -> AuditReport:
    return AuditReport(
        model=ModelInfo(n_params=39_760, uri="models:/fashion-mlp/3", name="fashion-mlp",
                        version="3", model_id="m-2f3c9a0d5b8e4f6b9b1c7f1f0a6d3e52",
                        flavor="pytorch (pt2)"),
        data=DataInfo(n_samples=6000, n_outputs=10, sha256=SHA, heldout_samples=None),
        family="categorical",
        dispersion=None,
        penalty=PenaltyInfo(
            value=1.21e-3, free_params=0, source="training",
            training={"optimizer": "sgd", "sum_lr": 900.0, "momentum": 0.9, "batch_size": 64,
                      "weight_decay": 1e-4},
            stationarity=0.081,
            assumptions=("constant learning rate of 0.1 over 900 steps, read from the run's params",
                         "the last epoch's short batch was kept")),
        train=Fit(nll=0.2104, accuracy=0.9312),
        heldout=None,
        calibration=Calibration(
            evidence="loo", n=6000, verdict="calibrated", direction="none", severity="none",
            ece=0.0121, ece_if_calibrated=0.0135, mce=0.061, ace=0.0119, mean_confidence=0.9142,
            accuracy=0.9127, slope=0.982, slope_ci=(0.938, 1.026), confidence_gap=0.0015,
            confidence_gap_ci=(-0.0046, 0.0076),
            p_values={"slope": 0.41, "bins": 0.63, "bias": 0.29}),
        estimates=Estimates(
            soft_rank=Estimate(gap=0.0523, se=0.0069, rank=RANK),
            tic=Estimate(gap=0.0471, se=0.0071, centred=0.0469),
            loo=Estimate(gap=0.0548, se=0.0078, accuracy=0.9127, mean_confidence=0.9142)),
        premise=Premise(information_ratio=0.941, z=-1.12, evidence="loo"),
        gap=Gap(value=0.0523, low=0.0409, high=0.0637, level=0.9, estimator="soft_rank",
                reason="the model is calibrated, where the soft rank is right and steadiest"),
        predicted_test_nll=Interval(0.2627, 0.2513, 0.2741),
        predicted_accuracy=Interval(0.9127, 0.9067, 0.9187),
        confidence="ok",
        warnings=(AuditWarning("high_leverage", "info",
                               "12 of 6,000 samples have leverage above 1 (mean 0.052)."),),
        solver=SolverInfo(name="dual", exact=True, reason="N = 54,000 > P = 39,760 but ...",
                          device="cuda (NVIDIA H100)", dtype="float64", seconds=214.6,
                          peak_bytes=25 * 2**30),
        samples=_samples(),
    )  # fmt: skip


def _refused() -> AuditReport:
    base = calibrated_report()
    return dataclasses.replace(
        base,
        model=ModelInfo(n_params=1_199_882, uri="models:/mnist-cnn@candidate", name="mnist-cnn",
                        version="12", model_id="m-77aa", flavor="pytorch"),
        penalty=PenaltyInfo(value=2.1e-6, free_params=0, source="evidence", training=None,
                            stationarity=0.97,
                            assumptions=("one penalty for all parameters",)),
        train=Fit(nll=0.0041, accuracy=0.9991),
        calibration=Calibration(
            evidence="loo", n=6000, verdict="miscalibrated", direction="over", severity="critical",
            ece=0.162, ece_if_calibrated=0.009, mce=0.31, ace=0.159, mean_confidence=0.968,
            accuracy=0.806, slope=0.41, slope_ci=(0.37, 0.45), confidence_gap=0.162,
            confidence_gap_ci=(0.153, 0.171),
            p_values={"slope": 0.0, "bins": 3e-40, "bias": 0.0004},
            saturation=("accuracy", "nll", "gini")),
        estimates=Estimates(
            soft_rank=Estimate(gap=0.21, se=0.019, rank=1260.0),
            tic=Estimate(gap=0.034, se=0.011),
            loo=Estimate(gap=1.41, se=0.07, accuracy=0.806, mean_confidence=0.968),
            soft_rank_recalibrated=Estimate(gap=0.62, se=0.021, rank=3720.0, scale=0.31)),
        premise=Premise(information_ratio=12.9, z=31.2, evidence="train"),
        gap=Gap(value=0.62, low=0.585, high=0.655, level=0.9, estimator="soft_rank_recalibrated",
                reason="the model is over-confident, so the soft rank is taken where its "
                "confidence would be right", lower_bound=True),
        predicted_test_nll=Interval(0.6241, 0.5896, 0.6586),
        predicted_accuracy=Interval(0.806, 0.7976, 0.8144),
        confidence="refused",
        warnings=(
            AuditWarning("penalty_unknown", "high", "No training record was found: the penalty "
                         "2.1e-06 is the evidence fixed point; stationarity 0.97."),
            AuditWarning("overconfident", "critical", "Confidence exceeds accuracy by 0.153 or "
                         "more (leave-one-out predictions)."),
            AuditWarning("train_saturated", "critical", "Train accuracy 0.999 and NLL 0.0041: the "
                         "gradients have vanished."),
            AuditWarning("estimators_disagree", "warn", "TIC 0.034 and LOO 1.41 differ by 1.38."),
            AuditWarning("high_leverage", "info", "3 samples have leverage above 1."),
        ),
    )  # fmt: skip


def _regression() -> AuditReport:
    base = calibrated_report()
    return dataclasses.replace(
        base,
        model=ModelInfo(n_params=11, uri="runs:/4b0c/model", flavor="sklearn (skops)"),
        data=DataInfo(n_samples=353, n_outputs=1, sha256=SHA, heldout_samples=89),
        family="gaussian",
        dispersion=Dispersion(value=2893.4, source="residuals"),
        penalty=PenaltyInfo(value=None, free_params=1, source="estimator", training=None,
                            stationarity=4e-13, low=9.8e-7, high=9.8e-7),
        train=Fit(nll=5.3941, accuracy=None),
        heldout=HeldoutFit(nll=5.4398, accuracy=None, gap=0.0457, gap_se=0.061),
        calibration=Calibration(evidence="heldout", n=89, verdict="insufficient",
                                direction="none", severity="none",
                                p_values={"dispersion": 0.61, "bias": 0.22, "pit": 0.34}),
        estimates=Estimates(
            soft_rank=Estimate(gap=0.0303, se=0.037, rank=10.9),
            tic=Estimate(gap=0.0298, se=0.038, centred=0.0298),
            loo=Estimate(gap=0.0311, se=0.039)),
        premise=Premise(information_ratio=0.98, z=-0.2, evidence="loo"),
        gap=Gap(value=0.0311, low=-0.0331, high=0.0953, level=0.9, estimator="loo",
                reason="too few held-out samples to show calibration, and the model is linear"),
        predicted_test_nll=Interval(5.4252, 5.361, 5.4894),
        predicted_accuracy=None,
        confidence="low",
        warnings=(AuditWarning("few_calibration_samples", "warn",
                               "89 held-out samples; 200 are needed."),),
        solver=SolverInfo("primal", True, "P = 11 is below N = 353", "cpu", "float64", 0.02,
                          84_000),
    )  # fmt: skip


def _without_loo() -> AuditReport:
    base = calibrated_report()
    return dataclasses.replace(
        base,
        model=ModelInfo(n_params=11_181_642),
        estimates=Estimates(soft_rank=Estimate(gap=0.081, se=float("nan"), rank=486.0),
                            tic=Estimate(gap=0.079, se=float("inf"))),
        premise=None,
        calibration=Calibration(evidence="train", n=6000, verdict="unknown", direction="none",
                                severity="none"),
        gap=Gap(value=0.081, low=float("nan"), high=float("nan"), level=0.9,
                estimator="soft_rank", reason="the only estimator this solver gives"),
        predicted_test_nll=Interval(0.2914, float("nan"), float("nan")),
        predicted_accuracy=None,
        penalty=PenaltyInfo(value=1e-4, free_params=9600, source="argument", training=None,
                            stationarity=None),
        confidence="low",
        warnings=(
            AuditWarning("approximate_solver", "warn", "30 posterior samples; relative SE 4 %."),
            AuditWarning("outside_theory", "warn", "Batch normalisation was frozen at its running "
                         "averages."),
        ),
        solver=SolverInfo("sampling", False, "min(P, N) = 54,000 does not fit into 24 GiB", "cpu",
                          "float32 with float64 sums", 5400.0, 3 * 2**30),
    )  # fmt: skip


def _pit() -> Any:
    counts = [4, 9, 12, 8, 10, 7, 11, 9, 6, 13]
    bins = [{"left": i / 10, "right": (i + 1) / 10, "count": c, "low": 4.0, "high": 15.0}
            for i, c in enumerate(counts)]  # fmt: skip
    bins[0]["count"], bins[-1]["count"] = 3, 17
    return {"kind": "regression", "bins": bins}


def made_up() -> dict[str, Made]:
    """Name: (report JSON after a round trip, display)."""
    leverage = _spectrum(1, 1, 3)["leverage"]
    too_large = {
        "ratios": None,
        "reason": "min(P, N) = 54,000 is above 4,000",
        "leverage": leverage,
    }
    found: dict[str, tuple[AuditReport, Any]] = {
        "calibrated": (calibrated_report(), {"reliability": _reliability(1.0, "loo"),
                                       "spectrum": _spectrum(4.278e4, 2.0, 4000),
                                       "influence": _influence(50)}),
        "refused": (_refused(), {"reliability": _reliability(3.0, "loo"), "spectrum": too_large,
                                 "influence": _influence(30)}),
        "regression": (_regression(), {"reliability": _pit(),
                                       "spectrum": _spectrum(4e4, 3.0, 10),
                                       "influence": _influence(8, real=True)}),
        "without_loo": (_without_loo(), {
            "reliability": None,
            "spectrum": {"ratios": None, "reason": "too large", "leverage": []},
            "influence": [row | {"loo": None} for row in _influence(5)]}),
    }  # fmt: skip
    return {
        name: (json.loads(json.dumps(report.to_dict(), allow_nan=False)), display)
        for name, (report, display) in found.items()
    }


def slice_table(column: str, size: int, *, few: int = 0) -> SliceTable:
    """Slices of falling gap; the last `few` are small, one of them a single sample."""
    rng = np.random.default_rng(4)
    rows = []
    for i in range(size):
        small = i >= size - few
        n = 1 if i == size - 1 and few else int(rng.integers(2, 9) if small else 600)
        p = float(1 - 0.3 * np.exp(-i / 4))
        rows.append(SliceRow(
            value=f"{column} {i}", n=n, train_nll=0.2, gap=0.3 * float(np.exp(-i / 4)),
            gap_se=None if n == 1 else 0.02 * float(np.sqrt(600 / n)),
            train_accuracy=min(1.0, p + 0.02),
            predicted_accuracy=Interval(p, max(0.0, p - 0.03), min(1.0, p + 0.03)),
        ))  # fmt: skip
    return SliceTable(column, "loo", 0.0548, tuple(rows))


def with_everything() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """A report with every section: held-out data, shift, sensitivity, slices, history."""
    base = calibrated_report()
    report = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, heldout_samples=1500),
        heldout=HeldoutFit(nll=0.281, accuracy=0.904, gap=0.0706, gap_se=0.011),
        shift=Shift(p_value=0.002, statistic=5.1, n_features_shifted=3, worst_feature=17,
                    worst_distance=0.21, joint_distance=0.3, n_features=784),
        sensitivity=(PenaltyPoint(1 / 3, 0.0612, 0.05, 0.0701),
                     PenaltyPoint(1.0, 0.052, 0.047, 0.055),
                     PenaltyPoint(3.0, 0.041, 0.04, 0.05)),
        classes=slice_table("class", 10),
        slices=(slice_table("a very long name of a column that people chose", 40, few=4),),
        warnings=(*base.warnings,
                  AuditWarning("outside_theory", "warn", "The held-out inputs differ: p = 0.002.")),
    )  # fmt: skip
    display = {
        "reliability": _reliability(1.0, "heldout"),
        "spectrum": _spectrum(4.278e4, 2.0, 4000),
        "influence": _influence(50),
    }
    history = [
        {"version": str(3 - i // 4), "run_id": f"run{i}",
         "audited_at": f"2026-0{9 - i}-03T08:00:00+00:00",
         "verdict": ("pass", "warn", "fail")[i % 3], "confidence": "ok", "gap": 0.05 + 0.01 * i,
         "gap_low": 0.04, "gap_high": 0.07 + 0.01 * i, "heldout_gap": None if i % 2 else 0.06}
        for i in range(7)
    ]  # fmt: skip
    return json.loads(json.dumps(report.to_dict(), allow_nan=False)), display, history


def large() -> Made:
    """10,000 samples, 100 classes and 100 slices, a spectrum of 50,000: as large as pages get."""
    report = dataclasses.replace(
        calibrated_report(),
        data=DataInfo(n_samples=10_000, n_outputs=100, sha256=SHA),
        classes=slice_table("class", 100),
        slices=(slice_table("shop", 100, few=20),),
    )
    display = {
        "reliability": _reliability(1.0, "loo", n=10_000),
        "spectrum": _spectrum(4.278e8, 2.0, 50_000),
        "influence": _influence(50),
    }
    return json.loads(json.dumps(report.to_dict(), allow_nan=False)), display
