"""The demo: three small networks on real digits, trained, registered, audited, and compared with
what really happens on held-out digits that neither training nor audit ever saw.

- digits-calibrated: labels drawn from a known model, so that the network, of the same form, can
  be calibrated and the soft rank is the right estimate;
- digits-underconfident: the true labels, stopped after a few passes;
- digits-overconfident: 15 % of the labels replaced at random, trained long enough to learn them.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Json = dict[str, Any]

N_TRAIN = 1200  # of scikit-learn's 1,797 digits; the others are held out
SEED = 0
TEMPERATURE = 1.5  # of the known model that labels are drawn from: its classes overlap
LABEL_NOISE = 0.15


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One network to train: its data, hidden width and the optimizer's settings."""

    name: str
    labels: Tensor
    hidden: int
    settings: Mapping[str, Any]


def run_demo(folder: Path) -> list[Json]:
    """Trains, registers and audits the three networks; prints the table; returns its rows.

    folder: holds the embedded MLflow store (database and artifacts) and the data files.
    """
    from rich.console import Console

    from flataudit.store import embedded_store

    console = Console()
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    folder = folder.resolve()
    uri = embedded_store(folder)
    x, cases = make_cases()
    models = []
    with console.status("training three networks on scikit-learn's digits"):
        for case in cases:
            models.append((case, *_register(case, x, uri)))
    from flows.audit import audit_flow

    rows = []
    for case, network, model_uri in models:
        with console.status(f"auditing {model_uri} through the Prefect flow"):
            found = audit_flow(model_uri, "mlflow", tracking_uri=uri)
        rows.append(_compare(case, network, x, model_uri, found))
    (folder / "demo.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    console.print(_table(rows))
    console.print(
        "gap: loss on unseen data minus loss on training data, nats per example; confidence gap:\n"
        f"mean confidence minus accuracy. Predicted from the {N_TRAIN} training digits alone,"
        f"\ntrue on {len(x) - N_TRAIN} held-out digits (+- standard error).\n",
        highlight=False,
        soft_wrap=True,
    )
    store = shlex.quote(f"sqlite:///{os.path.relpath(folder / 'mlflow.db')}")
    console.print("Open the audits in the MLflow UI:")
    command = f"ui --backend-store-uri {store} --port 5000"
    console.print(f"  {_program('mlflow')} {command}", soft_wrap=True, highlight=False)
    return rows


def make_cases() -> tuple[Tensor, list[Case]]:
    """All digits (1797, 64) in a fixed random order, and the three cases with labels for each."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(SEED))
    x = torch.from_numpy(digits.data)[order] / 16.0
    y = torch.from_numpy(digits.target)[order]
    sgd = {"optimizer": "sgd", "momentum": 0.9, "batch_size": 50}
    known = make_network(8)
    train(known, x, y, sgd | {"lr": 0.1, "schedule": "cosine", "weight_decay": 1e-3}, epochs=30)
    generator = torch.Generator().manual_seed(SEED + 1)
    with torch.no_grad():
        p = torch.softmax(known(x) / TEMPERATURE, dim=1)
    drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
    wrong = torch.rand(len(y), generator=generator) < LABEL_NOISE
    noisy = torch.where(wrong, torch.randint(0, 10, (len(y),), generator=generator), y)
    return x, [
        Case(
            "digits-calibrated",
            drawn,
            8,
            sgd | {"lr": 0.2, "schedule": "cosine", "weight_decay": 2e-3, "epochs": 30},
        ),
        Case(
            "digits-underconfident",
            y,
            16,
            sgd | {"lr": 0.02, "schedule": "constant", "weight_decay": 1e-4, "epochs": 8},
        ),
        Case(
            "digits-overconfident",
            noisy,
            16,
            sgd | {"lr": 0.1, "schedule": "constant", "weight_decay": 1e-4, "epochs": 100},
        ),
    ]


def make_network(hidden: int) -> nn.Sequential:
    """Digits in, ten logits out, float64."""
    torch.manual_seed(SEED)
    network = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return network.double()


def train(
    network: nn.Module, x: Tensor, y: Tensor, settings: Mapping[str, Any], *, epochs: int
) -> int:
    """Plain SGD on the mean cross-entropy; returns the number of steps."""
    batch: int = settings["batch_size"]
    steps: int = epochs * math.ceil(len(x) / batch)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings["lr"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            0.5 * (1 + math.cos(math.pi * step / steps))
            if settings["schedule"] == "cosine"
            else 1.0
        ),
    )
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
            rate.step()
    return steps


def _register(case: Case, x: Tensor, uri: str) -> tuple[nn.Module, str]:
    """Trains one network and registers it with its training record and data; its URI."""
    import mlflow

    from flataudit.store import ensure_experiment, use_tracking
    from flataudit.tracking import log_training_data

    use_tracking(uri)
    network = make_network(case.hidden)
    settings = dict(case.settings)
    epochs = settings.pop("epochs")
    xs, ys = x[:N_TRAIN], case.labels[:N_TRAIN]
    steps = train(network, xs, ys, settings, epochs=epochs)
    experiment = ensure_experiment("digits")
    with mlflow.start_run(experiment_id=experiment, run_name=case.name) as run:
        mlflow.log_params(settings | {"steps": steps})
        log_training_data(run.info.run_id, xs.numpy(), ys.numpy())
        info = mlflow.pytorch.log_model(
            network.eval(),
            name="model",
            serialization_format="pickle",
            registered_model_name=case.name,
            pip_requirements=["torch"],
        )
    return network, f"models:/{case.name}/{info.registered_model_version}"


def _compare(case: Case, network: nn.Module, x: Tensor, uri: str, found: Json) -> Json:
    """The audit's predictions beside what happens on the held-out digits."""
    report = found["report"]
    xs, ys = x[N_TRAIN:], case.labels[N_TRAIN:]
    with torch.no_grad():
        log_p = torch.log_softmax(network(xs), dim=1)
    nll = -log_p.gather(1, ys[:, None])[:, 0]
    confidence, top = log_p.exp().max(dim=1)
    hit = (top == ys).double()
    return {
        "model": uri,
        "true_gap": float(nll.mean()) - report["train"]["nll"],
        "true_gap_se": float(nll.std()) / math.sqrt(len(nll)),
        "gap": report["gap"],
        "true_accuracy": float(hit.mean()),
        "predicted_accuracy": report["predicted_accuracy"],
        "true_confidence_gap": float((confidence - hit).mean()),
        "predicted_confidence_gap": _confidence_gap(report),
        "verdict": report["calibration"]["verdict"],
        "direction": report["calibration"]["direction"],
        "confidence": report["confidence"],
        "run_id": found["run_id"],
    }


def _confidence_gap(report: Json) -> Json:
    """The predicted confidence gap with its 90 % interval.

    The report's own interval, which decides the direction, is wider by a known factor.
    """
    from statistics import NormalDist

    from flataudit.calibration import CalibrationPolicy

    value = report["calibration"]["confidence_gap"]
    low, high = report["calibration"]["confidence_gap_ci"]
    factor = NormalDist().inv_cdf(0.95) / CalibrationPolicy().direction_z
    half = factor * (high - low) / 2
    return {"value": value, "low": value - half, "high": value + half}


def _table(rows: list[Json]) -> Any:
    from rich import box
    from rich.table import Table

    from flataudit.report.words import percent

    title = "predicted by the audit, and what happens on digits that it never saw"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for row in rows:
        table.add_column(row["model"].removeprefix("models:/digits-"))
    lines = [
        ("gap", [f"{row['gap']['value']:.3f}" for row in rows]),
        ("  90 % interval", [_ends(row["gap"], 1.0) for row in rows]),
        ("  true", [f"{row['true_gap']:.3f} +- {row['true_gap_se']:.3f}" for row in rows]),
        ("  estimator", [row["gap"]["estimator"] for row in rows]),
        ("accuracy", [percent(row["predicted_accuracy"]["value"]) for row in rows]),
        ("  90 % interval", [_ends(row["predicted_accuracy"], 100.0) for row in rows]),
        ("  true", [percent(row["true_accuracy"]) for row in rows]),
        ("confidence gap", [f"{row['predicted_confidence_gap']['value']:+.3f}" for row in rows]),
        ("  90 % interval", [_ends(row["predicted_confidence_gap"], 1.0) for row in rows]),
        ("  true", [f"{row['true_confidence_gap']:+.3f}" for row in rows]),
        ("calibration", [row["verdict"] for row in rows]),
        ("  direction", [row["direction"] for row in rows]),
        ("rely on it", [row["confidence"] for row in rows]),
    ]
    for label, cells in lines:
        table.add_row(label, *cells)
    return table


def _ends(found: Json, scale: float) -> str:
    digits = 3 if scale == 1.0 else 1
    return f"{scale * found['low']:.{digits}f} to {scale * found['high']:.{digits}f}"


def _program(name: str) -> str:
    """How to call the program of this Python's environment from the working folder."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not beside.is_file() or (found and Path(found).samefile(beside)):
        return name
    inside = beside.is_relative_to(Path.cwd())
    return shlex.quote(str(beside.relative_to(Path.cwd()) if inside else beside))
