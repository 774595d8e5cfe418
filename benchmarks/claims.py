"""The paper's two claims as experiments, on labels whose law is known.

1. Calibrated models: soft rank / n meets the gap as n grows. Labels are drawn from a model of the
   family that is then fitted, so calibration holds exactly in the limit.
2. Models that are not calibrated: TIC holds unless they are over-confident. Penalty, sample size
   and label noise move a fit from under- to over-confident; a Gaussian variance that is stated
   wrongly makes it so by a known factor.

Inputs are real: Fashion-MNIST's first principal components. As the law p*(y|x) is known, a model's
test NLL is an exact expectation over labels on 20,000 inputs, and so is its slope, the factor on
the logits that the law would choose. The loss of a fixed reference model is taken off both sides of
the gap: its own gap has expectation zero, and most of the sampling noise goes with it.

    python benchmarks/claims.py [--data FOLDER] [--seconds S] [--family NAME]

Goes on from benchmarks/claims.json, and writes it after every round of draws; `claims_page.py`
renders docs/claims.md from it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.machine import machine
from benchmarks.zoo.data import Pool, Sources, pools

RESULTS = Path(__file__).with_suffix(".json")
SEED = 2506
SIZES = [250, 500, 1000, 2000, 4000, 8000, 16_000]
FEATURES = 20
LAW_SAMPLES = 16_000  # real labels that a network as a law is fitted to
LAW_STEPS = 300  # networks as laws and as references need not be at a minimum
REFERENCE_SAMPLES = 4_000
REFERENCE_STEPS = 100
PENALTIES = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One fit, drawn `draws` times.

    claim: 1 or 2; family: gaussian, bernoulli, softmax, mlp (FEATURES-8-10 tanh) or wide
    (FEATURES-40-10); n: samples; penalty: D on weights, or None for one that vanishes as 1/n: the
    precision of the prior to which the law's weights are typical, over n; noise: share of labels
    drawn uniformly; variance: the Gaussian variance that is stated, in units of the true one.
    """

    claim: int
    family: str
    n: int
    draws: int
    penalty: float | None = None
    noise: float = 0.0
    variance: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.claim} {self.family} {self.n} {self.penalty} {self.noise} {self.variance}"


def cells() -> list[Cell]:
    """All experiments; a draw's inputs and labels depend on (family, n, noise) and its number."""
    found = []
    for family, draws in (("gaussian", 32), ("bernoulli", 24), ("softmax", 8), ("mlp", 4)):
        found += [Cell(1, family, n, draws) for n in SIZES]
    for n in (250, 1000, 4000, 16_000):
        found += [Cell(2, "gaussian", n, 16, variance=v) for v in (0.25, 0.5, 1.0, 2.0, 4.0)]
    for n in (250, 1000, 4000):
        found += [Cell(2, "softmax", n, 6, penalty=d) for d in PENALTIES]
        for noise in (0.0, 0.4) if n < 4000 else (0.0,):
            draws = {250: 6, 1000: 4, 4000: 3}[n]
            found += [Cell(2, "wide", n, draws, penalty=d, noise=noise) for d in PENALTIES[1:]]
    return found


# --- laws and losses ----------------------------------------------------------------------------


class Model(Protocol):
    """Expected and actual losses of one model in nats, under a law."""

    def losses(self, x: Array, y: Array) -> Array:
        """-log p(y_i | x_i), (n,)."""
        ...

    def expected(self, x: Array, law: Any) -> Array:
        """The law's conditional expectation of the loss at each x_i, (n,)."""
        ...


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted scikit-learn classifier as a model, and with `noise` as a law."""

    estimator: Any
    noise: float = 0.0

    def log_p(self, x: Array) -> Array:
        log_p = self.estimator.predict_log_proba(x)
        if self.noise:
            log_p = np.log((1.0 - self.noise) * np.exp(log_p) + self.noise / log_p.shape[1])
        return np.asarray(log_p)

    def draw(self, x: Array, rng: np.random.Generator) -> Array:
        edges = np.exp(self.log_p(x)).cumsum(axis=1)[:, :-1]
        return np.asarray((rng.random((len(x), 1)) > edges).sum(axis=1))

    def losses(self, x: Array, y: Array) -> Array:
        return np.asarray(-self.log_p(x)[np.arange(len(y)), y])

    def expected(self, x: Array, law: Classifier) -> Array:
        return np.asarray(-(np.exp(law.log_p(x)) * self.log_p(x)).sum(axis=1))

    def slope(self, x: Array, law: Classifier) -> float:
        """The factor on the logits that the law would choose: below 1 is over-confident."""
        log_p, p = self.log_p(x), np.exp(law.log_p(x))

        def nll(log_s: float) -> float:
            scaled = math.exp(log_s) * log_p
            return float((special.logsumexp(scaled, axis=1) - (p * scaled).sum(axis=1)).mean())

        return math.exp(optimize.minimize_scalar(nll, bounds=(-4, 4), method="bounded").x)


@dataclass(frozen=True, eq=False)
class Line:
    """A fitted linear regression with a variance, as a model and as a law."""

    estimator: Any
    variance: float

    def draw(self, x: Array, rng: np.random.Generator) -> Array:
        mean = self.estimator.predict(x)
        return np.asarray(mean + math.sqrt(self.variance) * rng.standard_normal(len(x)))

    def losses(self, x: Array, y: Array) -> Array:
        return self._nll((y - self.estimator.predict(x)) ** 2)

    def expected(self, x: Array, law: Line) -> Array:
        bias = self.estimator.predict(x) - law.estimator.predict(x)
        return self._nll(bias**2 + law.variance)

    def slope(self, x: Array, law: Line) -> float:
        bias = self.estimator.predict(x) - law.estimator.predict(x)
        return self.variance / float((bias**2 + law.variance).mean())

    def _nll(self, square: Array) -> Array:
        log = 0.5 * math.log(2 * math.pi * self.variance)
        return np.asarray(square / (2 * self.variance) + log)


# --- fits ---------------------------------------------------------------------------------------


def fit(
    family: str,
    x: Array,
    y: Array,
    penalty: float,
    variance: float = 1.0,
    seed: int = SEED,
    steps: int = 3_000,
) -> Any:
    """The minimum of mean NLL + penalty |weights|^2/2, intercepts free; networks: after L-BFGS."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neural_network import MLPClassifier

    n = len(y)
    if family == "gaussian":
        return Ridge(alpha=n * penalty * variance).fit(x, y)
    if family in ("bernoulli", "softmax"):
        return LogisticRegression(C=1.0 / (n * penalty), tol=1e-8, max_iter=20_000).fit(x, y)
    width = {"mlp": 8, "wide": 40}[family]
    network = MLPClassifier(
        (width,), activation="tanh", solver="lbfgs", alpha=n * penalty, tol=1e-9, max_iter=steps,
        max_fun=100_000, random_state=seed,
    )  # fmt: skip
    with warnings.catch_warnings():
        # Each row has its stationarity residual.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return network.fit(x, y)


@dataclass(frozen=True, eq=False)
class World:
    """Inputs and laws: everything that is the same for all draws."""

    train: Pool
    test: Pool

    def law(self, cell: Cell) -> Any:
        """The model that draws a cell's labels, fitted to the real labels of the training pool."""
        if cell.family == "gaussian":
            return self._line
        if cell.family == "bernoulli":
            return self._pair
        if cell.family == "softmax":
            return self._linear
        return Classifier(self._net if cell.family == "mlp" else self._wide, cell.noise)

    def prior(self, cell: Cell) -> float:
        """1 over the mean square of the law's weights."""
        estimator = self.law(cell).estimator
        weights = estimator.coefs_ if hasattr(estimator, "coefs_") else [estimator.coef_]
        flat = np.concatenate([np.ravel(w) for w in weights])
        return 1.0 / float((flat**2).mean())

    def penalty(self, cell: Cell) -> float:
        """D: the cell's, or the prior's precision over n."""
        return self.prior(cell) / cell.n if cell.penalty is None else cell.penalty

    @cached_property
    def references(self) -> dict[str, Any]:
        return {}

    def reference(self, cell: Cell) -> Any:
        """A fixed model near the fits: the law, or for a penalty a fit to many other labels."""
        law = self.law(cell)
        if cell.family == "gaussian":
            return Line(law.estimator, cell.variance * law.variance)
        if cell.penalty is None:
            return law
        key = f"{cell.family} {cell.penalty} {cell.noise}"
        if key not in self.references:
            rng = np.random.default_rng([SEED, zlib.crc32(key.encode())])
            x = self.train.x[:REFERENCE_SAMPLES]
            y = law.draw(x, rng)
            found = fit(cell.family, x, y, cell.penalty, steps=REFERENCE_STEPS)
            self.references[key] = Classifier(found)
        return self.references[key]

    @cached_property
    def _line(self) -> Line:
        """The class number by least squares, with its residual variance."""
        found = fit("gaussian", self.train.x, self.train.y, 1e-6)
        return Line(found, float(((self.train.y - found.predict(self.train.x)) ** 2).mean()))

    @cached_property
    def _pair(self) -> Classifier:
        """Garments for the upper body against the rest."""
        upper = np.isin(self.train.y, (0, 2, 3, 4, 6)).astype(int)
        return Classifier(fit("bernoulli", self.train.x, upper, 1e-3))

    @cached_property
    def _linear(self) -> Classifier:
        return Classifier(fit("softmax", self.train.x, self.train.y, 1e-3))

    @cached_property
    def _net(self) -> Any:
        part = self.train.take(slice(LAW_SAMPLES))
        return fit("mlp", part.x, part.y, 1e-3, steps=LAW_STEPS)

    @cached_property
    def _wide(self) -> Any:
        part = self.train.take(slice(LAW_SAMPLES))
        return fit("wide", part.x, part.y, 1e-4, steps=LAW_STEPS)


def make_world(folder: Path | None = None) -> World:
    """Fashion-MNIST's first principal components, scaled by one number to mean square 1."""
    found = pools("fashion-mnist", Sources(folder))
    flat = found.train.x.reshape(len(found.train), -1).astype(np.float64)
    centre = flat.mean(axis=0)
    _, axes = np.linalg.eigh((flat - centre).T @ (flat - centre))
    axes = axes[:, : -FEATURES - 1 : -1]
    scale = math.sqrt(float((((flat - centre) @ axes) ** 2).mean()))

    def project(pool: Pool) -> Pool:
        x = pool.x.reshape(len(pool), -1).astype(np.float64)
        return Pool((x - centre) @ axes / scale, pool.y)

    return World(project(found.train), project(found.test))


# --- one draw -----------------------------------------------------------------------------------


def measure(cell: Cell, draw: int, world: World) -> dict[str, Any]:
    """Draws inputs and labels, fits, audits, and measures the true gap.

    gap: expected test minus training NLL, less the reference's; gap_plain: with nothing taken off;
    gap_fixed: as gap, with new labels at the training inputs in place of new inputs.
    """
    import flataudit

    started = time.process_time()
    # Cells that differ in penalty or stated variance alone share their draws.
    name = f"{cell.family} {cell.n} {cell.noise}"
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode()), draw])
    x = world.train.x[rng.choice(len(world.train), cell.n, replace=False)]
    law, reference = world.law(cell), world.reference(cell)
    y = law.draw(x, rng)
    true_variance = law.variance if cell.family == "gaussian" else 1.0
    stated = cell.variance * true_variance
    penalty = world.penalty(cell)
    options: dict[str, Any] = {}
    if cell.family == "gaussian":
        # The same fit for every stated variance: D in units of the stated NLL.
        penalty /= true_variance
        options = {"dispersion": stated}
    estimator = fit(cell.family, x, y, penalty, true_variance, seed=int(rng.integers(2**32)))
    report = flataudit.audit(
        estimator, (x, y), sensitivity=False,
        recalibrate=cell.claim == 2 and cell.family != "gaussian", **options,
    )  # fmt: skip

    model = Line(estimator, stated) if cell.family == "gaussian" else Classifier(estimator)
    train = float(model.losses(x, y).mean())
    if abs(train - report.train.nll) > 1e-8 * max(1.0, abs(train)):
        raise ArithmeticError(f"expected the audit's training NLL {report.train.nll}, got {train}")
    test = float(model.expected(world.test.x, law).mean())
    reference_train = float(reference.losses(x, y).mean())
    own = test - float(reference.expected(world.test.x, law).mean())
    fixed = float((model.expected(x, law) - reference.expected(x, law)).mean())
    found = report.estimates
    return {
        "gap": own - (train - reference_train),
        "gap_plain": test - train,
        "gap_fixed": fixed - (train - reference_train),
        "soft_rank": found.soft_rank.gap,
        "tic": found.tic.gap,
        "tic_centred": found.tic.centred,
        "loo": found.loo.gap if found.loo else None,
        "recalibrated": found.soft_rank_recalibrated.gap if found.soft_rank_recalibrated else None,
        "information_ratio": report.premise.information_ratio if report.premise else None,
        "train_nll": train,
        "slope": model.slope(world.test.x[:5000], law),
        "verdict": report.calibration.verdict,
        "direction": report.calibration.direction,
        "warnings": " ".join(sorted(w.code for w in report.warnings)),
        "n_params": report.model.n_params,
        "penalty": penalty * true_variance / stated,
        "stationarity": report.penalty.stationarity,
        "seconds": time.process_time() - started,
    }


# --- all draws, resumable -----------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """The results so far: {machine, seed, columns, cells: [{cell, rows by draw}]}."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    about = machine(threads=1)
    about["libraries"]["scikit-learn"] = version("scikit-learn")  # type: ignore[index]
    return {"machine": about, "seed": SEED, "columns": [], "cells": []}


def save(results: dict[str, Any], path: Path) -> None:
    """A line per row, numbers to seven digits; in one step, so that a kill leaves a whole file."""
    lines = []
    for entry in results["cells"]:
        rows = ",\n".join("  " + json.dumps(row) for row in entry["rows"])
        lines.append(f'{{"cell": {json.dumps(entry["cell"])}, "rows": [\n{rows}]}}')
    head = json.dumps({k: v for k, v in results.items() if k != "cells"}, indent=1)
    text = head[:-2] + ',\n "cells": [\n' + ",\n".join(lines) + "\n]}\n"
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def significant(value: Any) -> Any:
    """A number with seven significant digits."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def pending(results: dict[str, Any]) -> Iterator[tuple[int, Cell]]:
    """(draw, cell) still to do, a draw of every cell before the next draw of any."""
    done = {Cell(**entry["cell"]).key: len(entry["rows"]) for entry in results["cells"]}
    wanted = cells()
    for draw in range(max(cell.draws for cell in wanted)):
        for cell in wanted:
            if draw < cell.draws and done.get(cell.key, 0) <= draw:
                yield draw, cell


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, help="folder with fashion-mnist/")
    arguments.add_argument("--seconds", type=float, default=math.inf, help="stop after about S")
    arguments.add_argument("--family", help="gaussian, bernoulli, softmax, mlp or wide alone")
    given = arguments.parse_args()
    results = load(RESULTS)
    left = [each for each in pending(results) if given.family in (None, each[1].family)]
    left.sort(key=lambda each: each[1].family == "wide")  # the slowest last
    if not left:
        print("every draw is there")
        return
    entries = {Cell(**entry["cell"]).key: entry for entry in results["cells"]}
    for cell in cells():
        entries.setdefault(cell.key, {"rows": []})["cell"] = asdict(cell)
    results["cells"] = [entries[cell.key] for cell in cells()]
    world, started, saved = make_world(given.data), time.monotonic(), time.monotonic()
    done = 0
    for draw, cell in left:
        row = {name: significant(value) for name, value in measure(cell, draw, world).items()}
        results["columns"] = list(row)
        entries[cell.key]["rows"].append(list(row.values()))
        done += 1
        if time.monotonic() - saved > 20:
            save(results, RESULTS)
            saved = time.monotonic()
        if time.monotonic() - started > given.seconds:
            break
    save(results, RESULTS)
    print(f"{done} of {len(left)} draws made, {len(left) - done} left")


if __name__ == "__main__":
    main()
