"""Exponential families: what a network's outputs mean.

The network's outputs f (n, K) are the *natural parameters* (logits; log rate; mean over variance
for the Gaussian, written here in the mean with the dispersion held fixed). For each family

    l_i = -log p(y_i | f_i)            negative log-likelihood, constants included, nats
    mu_i, Lambda_i = d2 l_i / df_i^2   mean and variance; Lambda does not depend on y
    r_i = dl_i / df_i = S_i v_i        residual
    Lambda_i = S_i S_i'                S_i (K, K'), K' = K - 1 for the categorical family

The square root with K - 1 columns (theory: Householder basis U of the complement of q = sqrt(p),
S = diag(q) U) keeps every factorisation free of the softmax's null direction.
Source: arXiv 2506.17809 for the estimates; the square root's use is in docs/solvers.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flataudit.errors import InputError
from flataudit.results import FamilyName

# A true label less likely than this breaks v = -U[y]/sqrt(p_y) in float64; curvature and residual
# are taken at p = max(p, FLOOR), renormalised, for such samples alone (error 6e-7 at p_y 1e-305).
PROBABILITY_FLOOR = 1e-8
# exp(-|f|/2) stays a normal float64 up to here; beyond, a Bernoulli variance underflows.
LOGIT_LIMIT = 1200.0
# A count above 0 at a rate below exp(-250): curvature and residual are taken there, so that the
# squares of whitened residuals, and their squares, stay finite.
LOG_RATE_LIMIT = 250.0


@dataclass(frozen=True, slots=True)
class Factor:
    """The square root of one family's variance at given outputs.

    root: S (n, K, K') with S S' = Lambda; residual: v (n, K') with S v = r.
    """

    root: Tensor
    residual: Tensor


class Family(Protocol):
    """One exponential family; `dispersion` is 1 except for the Gaussian."""

    name: FamilyName

    def check(self, y: Tensor, n_outputs: int) -> Tensor:
        """Targets in the family's own type and shape, or InputError."""
        ...

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Negative log-likelihood per sample (n,), constants included."""
        ...

    def factor(self, f: Tensor, y: Tensor) -> Factor:
        """Square root of the variance and the whitened residual."""
        ...

    def shift(self, f: Tensor, y: Tensor, b: Tensor) -> Tensor:
        """The output shift s (n, K) with S's = b, up to what the likelihood ignores."""
        ...

    def whiten(self, f: Tensor, y: Tensor, r: Tensor) -> Tensor:
        """v (n, K') with S v = r for any residual r (n, K) in the range of Lambda."""
        ...

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """mu(f) - T(y) (over the dispersion), (n, K)."""
        ...


class Categorical:
    """Softmax over K >= 2 classes; labels are integers 0..K-1.

    >>> f = torch.zeros(1, 2, dtype=torch.float64)
    >>> round(Categorical().nll(f, torch.tensor([0])).item(), 6)
    0.693147
    """

    name: FamilyName = "categorical"

    def check(self, y: Tensor, n_outputs: int) -> Tensor:
        if n_outputs < 2:
            raise InputError(
                f"expected at least 2 outputs for the categorical family, got {n_outputs};"
                " use family=bernoulli for one logit"
            )
        y = _integer_labels(_flat(y))
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= n_outputs:
            raise InputError(
                f"expected labels 0..{n_outputs - 1} for {n_outputs} outputs, got labels from"
                f" {low} to {high}; map the labels to class indices"
            )
        return y

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(f, y, reduction="none")

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        r = torch.softmax(f, dim=1)
        r[torch.arange(len(y), device=y.device), y] -= 1.0
        return r

    def factor(self, f: Tensor, y: Tensor) -> Factor:
        q, basis = self._basis(f, y)
        label = basis.gather(1, y[:, None, None].expand(-1, 1, basis.shape[2]))[:, 0]
        v = -label / q.gather(1, y[:, None])
        return Factor(q[:, :, None] * basis, v)

    def shift(self, f: Tensor, y: Tensor, b: Tensor) -> Tensor:
        q, basis = self._basis(f, y)
        # S'(U b / q) = U'U b = b; what is left is a constant, which softmax ignores. A class with
        # p = 0 in float64 takes no part: its row of U is 0/0, and its shift is immaterial.
        moved = torch.einsum("nkj,nj->nk", basis, b)
        return torch.where(q > 0, moved / q.clamp_min(torch.finfo(q.dtype).tiny), 0.0)

    def whiten(self, f: Tensor, y: Tensor, r: Tensor) -> Tensor:
        q, basis = self._basis(f, y)
        scaled = torch.where(q > 0, r / q.clamp_min(torch.finfo(q.dtype).tiny), 0.0)
        return torch.einsum("nkj,nk->nj", basis, scaled)

    def _basis(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """q = sqrt(p) (n, K) and an orthonormal basis (n, K, K-1) of its complement."""
        log_p = torch.log_softmax(f, dim=1)
        label = log_p.gather(1, y[:, None])
        floored = torch.softmax(log_p.clamp_min(math.log(PROBABILITY_FLOOR)), dim=1)
        p = torch.where(label < math.log(PROBABILITY_FLOOR), floored, log_p.exp())
        q = torch.where(label < math.log(PROBABILITY_FLOOR), floored.sqrt(), (log_p / 2).exp())
        n_outputs = f.shape[1]
        pivot = p.argmax(dim=1)
        at_pivot = torch.nn.functional.one_hot(pivot, n_outputs).to(q.dtype)
        # The reflection that maps the pivot's axis to -q: I - (q+e)(q+e)'/(1 + q_pivot). The
        # largest p as pivot keeps the denominator in [1.3, 2] for any K <= 10: no cancellation.
        w = q + at_pivot
        reflect = torch.eye(n_outputs, dtype=q.dtype, device=q.device) - (
            w[:, :, None] * w[:, None, :] / w.gather(1, pivot[:, None])[:, :, None]
        )
        order = torch.arange(n_outputs - 1, device=q.device).expand(len(q), -1)
        columns = order + (order >= pivot[:, None])  # all columns but the pivot's
        return q, reflect.gather(2, columns[:, None, :].expand(-1, n_outputs, -1))


class Bernoulli:
    """One logit; labels are 0 and 1. In log space S = exp(-|f|/2)/(1 + exp(-|f|))."""

    name: FamilyName = "bernoulli"

    def check(self, y: Tensor, n_outputs: int) -> Tensor:
        if n_outputs != 1:
            raise InputError(
                f"expected 1 output for the bernoulli family, got {n_outputs};"
                " use family=categorical for several classes"
            )
        y = _integer_labels(_flat(y))
        if int(y.min()) < 0 or int(y.max()) > 1:
            raise InputError(
                f"expected labels 0 and 1 for one logit, got labels from {int(y.min())} to"
                f" {int(y.max())}; map the labels to 0 and 1"
            )
        return y.to(torch.float64)[:, None]

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        # log(1 + exp(-m)) with the margin m = (2y - 1) f keeps full relative precision.
        return torch.nn.functional.softplus((1.0 - 2.0 * y) * f, threshold=40.0)[:, 0]

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return (1.0 - 2.0 * y) * torch.sigmoid((1.0 - 2.0 * y) * f)

    def factor(self, f: Tensor, y: Tensor) -> Factor:
        f = self._bounded(f, y)
        decay = torch.exp(-f.abs())
        root = torch.exp(-f.abs() / 2) / (1.0 + decay)
        return Factor(root[:, :, None], (1.0 - 2.0 * y) * torch.exp((0.5 - y) * f))

    def shift(self, f: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return b / self.factor(f, y).root[:, :, 0]

    def whiten(self, f: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return r / self.factor(f, y).root[:, :, 0]

    @staticmethod
    def _bounded(f: Tensor, y: Tensor) -> Tensor:
        """Logits no further on the wrong side than the probability floor, none underflowing."""
        sign = 2.0 * y - 1.0
        floor = -math.log(1.0 / PROBABILITY_FLOOR - 1.0)
        return sign * (sign * f).clamp(floor, LOGIT_LIMIT)


class Gaussian:
    """Mean outputs (n, K), dispersion s2: l = sum_k (y-f)^2/(2 s2) + log(2 pi s2)/2."""

    name: FamilyName = "gaussian"

    def __init__(self, dispersion: float = 1.0) -> None:
        if not (math.isfinite(dispersion) and dispersion > 0):
            raise InputError(f"expected a dispersion above 0, got {dispersion}; give the variance")
        self.dispersion = dispersion

    def check(self, y: Tensor, n_outputs: int) -> Tensor:
        return _real_targets(y, n_outputs)

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        constant = 0.5 * math.log(2.0 * math.pi * self.dispersion)
        return ((y - f) ** 2 / (2.0 * self.dispersion) + constant).sum(dim=1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y) / self.dispersion

    def factor(self, f: Tensor, y: Tensor) -> Factor:
        deviation = math.sqrt(self.dispersion)
        eye = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
        return Factor((eye / deviation).expand(len(f), -1, -1), (f - y) / deviation)

    def shift(self, f: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return b * math.sqrt(self.dispersion)

    def whiten(self, f: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return r * math.sqrt(self.dispersion)


class Poisson:
    """Log rate f (n, K), counts y: l = exp(f) - y f + log y!, S = exp(f/2)."""

    name: FamilyName = "poisson"

    def check(self, y: Tensor, n_outputs: int) -> Tensor:
        y = _real_targets(y, n_outputs)
        if float(y.min()) < 0 or bool((y != y.round()).any()):
            raise InputError(
                "expected counts 0, 1, 2, ... for the poisson family, got negative or fractional"
                " targets; use family=gaussian for real targets"
            )
        return y

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        return (torch.exp(f) - y * f + torch.lgamma(y + 1.0)).sum(dim=1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.exp(f) - y

    def factor(self, f: Tensor, y: Tensor) -> Factor:
        root = torch.exp(f.clamp(-LOG_RATE_LIMIT, LOGIT_LIMIT) / 2)
        return Factor(torch.diag_embed(root), root - y / root)

    def shift(self, f: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return b / torch.exp(f.clamp(-LOG_RATE_LIMIT, LOGIT_LIMIT) / 2)

    def whiten(self, f: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return r / torch.exp(f.clamp(-LOG_RATE_LIMIT, LOGIT_LIMIT) / 2)


FAMILIES: tuple[FamilyName, ...] = ("categorical", "bernoulli", "gaussian", "poisson")


def make_family(name: str, y: Tensor, n_outputs: int, dispersion: float = 1.0) -> Family:
    """The family by name, or by the targets for `auto`.

    auto: integer or boolean labels with several outputs are categorical; one output and two
    labels bernoulli; real targets gaussian. Counts are never guessed to be poisson.

    Raises:
        InputError: unknown name, or labels from which no family follows.
    """
    if name == "auto":
        name = _guess(y, n_outputs)
    if name == "categorical":
        return Categorical()
    if name == "bernoulli":
        return Bernoulli()
    if name == "gaussian":
        return Gaussian(dispersion)
    if name == "poisson":
        return Poisson()
    raise InputError(f"unknown family {name!r}; choose one of: auto, {', '.join(FAMILIES)}")


def log_probabilities(family: Family, f: Tensor) -> Tensor | None:
    """log p over classes (n, K), two columns for the Bernoulli family; None for regression."""
    if family.name == "categorical":
        return torch.log_softmax(f, dim=1)
    if family.name == "bernoulli":
        logsigmoid = torch.nn.functional.logsigmoid
        return torch.cat([logsigmoid(-f), logsigmoid(f)], dim=1)
    return None


def _guess(y: Tensor, n_outputs: int) -> FamilyName:
    whole = not (y.is_floating_point() or y.is_complex())
    if whole and n_outputs > 1 and _columns(y) == 1:
        return "categorical"
    if whole and n_outputs == 1 and set(y.flatten().unique().tolist()) <= {0, 1}:
        return "bernoulli"
    if not whole:
        return "gaussian"
    raise InputError(
        f"expected a family that follows from the targets, got integer targets of shape"
        f" {tuple(y.shape)} for {n_outputs} outputs; name it with family=..."
    )


def _columns(y: Tensor) -> int:
    return 1 if y.ndim == 1 else math.prod(y.shape[1:])


def _flat(y: Tensor) -> Tensor:
    if _columns(y) != 1:
        raise InputError(
            f"expected one class label per sample, got targets of shape {tuple(y.shape)};"
            " give class indices, not one-hot rows"
        )
    return y.reshape(-1)


def _integer_labels(y: Tensor) -> Tensor:
    if y.is_floating_point() and not bool((torch.isfinite(y) & (y == y.round())).all()):
        raise InputError(
            "expected integer class labels, got fractional or non-finite values;"
            " use family=gaussian for real targets"
        )
    return y.to(torch.int64)


def _real_targets(y: Tensor, n_outputs: int) -> Tensor:
    if _columns(y) != n_outputs:
        raise InputError(
            f"expected targets with {n_outputs} column(s) for {n_outputs} output(s), got shape"
            f" {tuple(y.shape)}; give one target per output"
        )
    y = y.to(torch.float64).reshape(len(y), n_outputs)
    if not bool(torch.isfinite(y).all()):
        raise InputError("expected finite targets, got NaN or infinity; drop or repair those rows")
    return y
