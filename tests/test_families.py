"""Likelihoods, residuals and square roots, against densities, derivatives and 40-digit values."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from scipy import stats

from flataudit import estimates
from flataudit.curvature.problem import make_problem
from flataudit.errors import InputError
from flataudit.families import (
    FAMILIES,
    Bernoulli,
    Categorical,
    Gaussian,
    Poisson,
    log_probabilities,
    make_family,
)
from flataudit.solvers import SOLVERS
from tests.dense import dense, likelihood


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(name: str, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    f = 2 * torch.randn(30, outputs, generator=generator, dtype=torch.float64)
    uniform = torch.rand(30, outputs, generator=generator, dtype=torch.float64)
    y = {
        "categorical": (outputs * uniform[:, 0]).long(),
        "bernoulli": (uniform[:, 0] > 0.5).long(),
        "gaussian": 3 * uniform,
        "poisson": (6 * uniform).floor(),
    }[name]
    return f, y


EACH = [
    ("categorical", 2),
    ("categorical", 7),
    ("categorical", 100),
    ("bernoulli", 1),
    ("gaussian", 1),
    ("gaussian", 3),
    ("poisson", 1),
    ("poisson", 3),
]


@pytest.mark.parametrize(("name", "outputs"), EACH)
def test_family_equals_its_density(name, outputs):
    f, y = drawn(name, outputs)
    family = make_family(name, y, outputs, 0.7)
    checked = family.check(y, outputs)
    nll, residual, variance = likelihood(name, f, y, 0.7)
    factor = family.factor(f, checked)
    root, v = factor.root, factor.residual

    torch.testing.assert_close(family.nll(f, checked), nll, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(family.residual(f, checked), residual, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(root @ root.mT, variance, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((root @ v[:, :, None])[:, :, 0], residual, rtol=1e-10, atol=1e-13)
    assert root.shape[2] == (outputs - 1 if name == "categorical" else outputs)


@pytest.mark.parametrize(("name", "outputs"), EACH)
def test_residual_and_variance_are_derivatives(name, outputs):
    """r = dl/df and Lambda = d2l/df2, by automatic differentiation of the family's own nll."""
    f, y = drawn(name, outputs)
    family = make_family(name, y, outputs, 0.7)
    checked = family.check(y, outputs)
    leaf = f.clone().requires_grad_(True)
    (first,) = torch.autograd.grad(family.nll(leaf, checked).sum(), leaf, create_graph=True)
    torch.testing.assert_close(family.residual(f, checked), first.detach(), rtol=1e-9, atol=1e-12)
    root = family.factor(f, checked).root
    for k in range(min(outputs, 3)):
        (second,) = torch.autograd.grad(first[:, k].sum(), leaf, retain_graph=True)
        torch.testing.assert_close((root @ root.mT)[:, k], second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "outputs"), EACH)
def test_shift_and_whiten_invert_the_root(name, outputs):
    """S'shift(b) = b, and S whiten(r) = r for r in the range of Lambda."""
    f, y = drawn(name, outputs)
    family = make_family(name, y, outputs, 0.7)
    y = family.check(y, outputs)
    factor = family.factor(f, y)
    b = torch.randn(factor.residual.shape, generator=torch.Generator().manual_seed(1)).double()
    back = (factor.root.mT @ family.shift(f, y, b)[:, :, None])[:, :, 0]
    torch.testing.assert_close(back, b, rtol=1e-10, atol=1e-12)
    r = (factor.root @ b[:, :, None])[:, :, 0]
    torch.testing.assert_close(family.whiten(f, y, r), b, rtol=1e-9, atol=1e-11)
    whitened = family.whiten(f, y, family.residual(f, y))
    torch.testing.assert_close(whitened, factor.residual, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("outputs", [2, 10])
def test_whitened_residual_length(outputs):
    """|v|^2 = 1/p_y - 1 for softmax, and the square root has no null direction: K - 1 columns."""
    f, y = drawn("categorical", outputs)
    factor = Categorical().factor(f, y)
    p = torch.softmax(f, dim=1)
    label = p[torch.arange(30), y]
    torch.testing.assert_close(
        factor.residual.square().sum(dim=1), 1 / label - 1, rtol=1e-10, atol=0
    )
    orthonormal = factor.root / p.sqrt()[:, :, None]
    eye = torch.eye(outputs - 1, dtype=torch.float64).expand(30, -1, -1)
    torch.testing.assert_close(orthonormal.mT @ orthonormal, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        factor.root.sum(dim=1), torch.zeros(30, outputs - 1).double(), rtol=0, atol=1e-14
    )


def test_two_classes_are_one_logit():
    """Softmax over two classes is the Bernoulli of the difference of logits."""
    f, y = drawn("categorical", 2)
    logit = f[:, 1:] - f[:, :1]
    two, one = Categorical(), Bernoulli()
    floats = one.check(y, 1)
    torch.testing.assert_close(two.nll(f, y), one.nll(logit, floats), rtol=1e-12, atol=1e-15)
    # The single column of either square root, up to its sign.
    factors = two.factor(f, y), one.factor(logit, floats)
    torch.testing.assert_close(
        (factors[0].root[:, 1, 0]).abs(), factors[1].root[:, 0, 0], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        factors[0].residual.abs(), factors[1].residual.abs(), rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_two_classes_audit_as_one_logit(solver):
    """The same linear model written with two outputs (w/2, -w/2) and with one.

    |theta|^2 halves, so the penalty doubles.
    """
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    y = (torch.rand(40, generator=generator) > 0.4).long()
    w = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    one, two = (torch.nn.Linear(4, k, bias=False).double() for k in (1, 2))
    with torch.no_grad():
        one.weight.copy_(w)
        two.weight.copy_(torch.cat([-w / 2, w / 2]))
    found = []
    for model, family, penalty in ((one, Bernoulli(), 0.05), (two, Categorical(), 0.1)):
        problem = make_problem(model, x, family.check(y, model.out_features), family)
        d = {"weight": torch.full_like(model.weight.detach(), penalty)}
        variance = SOLVERS[solver].solve(problem, d)
        v = problem.factor.residual
        left_out = estimates.loo(variance, v, family, problem.outputs, problem.y)
        found.append((estimates.soft_rank(variance), estimates.tic(variance, v), left_out.psi))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-15)


# --- constants of the densities -----------------------------------------------------------------


def test_likelihoods_include_their_constants():
    assert Gaussian(0.7).nll(double([1.0]), double([2.5])).item() == pytest.approx(
        -stats.norm(1.0, math.sqrt(0.7)).logpdf(2.5), rel=1e-13
    )
    assert Poisson().nll(double([0.3]), double([4.0])).item() == pytest.approx(
        -stats.poisson(math.exp(0.3)).logpmf(4), rel=1e-13
    )
    assert Bernoulli().nll(double([0.3]), double([1.0])).item() == pytest.approx(
        math.log1p(math.exp(-0.3)), rel=1e-14
    )
    two = Gaussian(0.7).nll(double([1.0, 0.0]), double([2.5, 1.0])).item()
    parts = [stats.norm(0, math.sqrt(0.7)).logpdf(z) for z in (1.5, 1.0)]
    assert two == pytest.approx(-sum(parts), rel=1e-13)


# --- saturated outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [-1000.0, -700.0, -40.0, -1.0, 0.0, 1.0, 40.0, 700.0, 1000.0])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_bernoulli_at_any_logit(logit, label):
    family, f, y = Bernoulli(), double([logit]), double([label])
    factor = family.factor(f, y)
    with mpmath.workdps(500):
        margin = (2 * label - 1) * mpmath.mpf(logit)
        nll = float(mpmath.log1p(mpmath.exp(-margin)))
        residual = float((1 - 2 * label) / (1 + mpmath.exp(margin)))
        root = float(mpmath.exp(-abs(margin) / 2) / (1 + mpmath.exp(-abs(margin))))
        whitened = float((1 - 2 * label) * mpmath.exp(-margin / 2))
    assert family.nll(f, y).item() == pytest.approx(nll, rel=1e-14)
    assert family.residual(f, y).item() == pytest.approx(residual, rel=1e-14)
    if margin > -18:  # no label less likely than 1e-8: no floor
        assert factor.root.item() == pytest.approx(root, rel=1e-13)
        assert factor.root.item() > 0
        assert factor.residual.item() == pytest.approx(whitened, rel=1e-13)
    else:
        assert math.isfinite(factor.residual.item())
        p = factor.root.item() ** 2
        assert p == pytest.approx(1e-8, rel=1e-6)


def saturated() -> tuple[torch.Tensor, torch.Tensor]:
    """True labels with p down to 1e-300, other classes down to 1e-306, and certain ones."""
    other, label = 306 * math.log(10), 300 * math.log(10)
    f = double(
        [0.0, -1.0, -other],  # a class that is all but impossible
        [-label, 0.0, -1.0],  # the true label is all but impossible
        [-label, 0.0, -other],
        [800.0, 0.0, 0.0],  # certain, and right
        [1000.0, 1000.0, 0.0],
        [0.0, -1.0, 1.0],
    )
    return f, torch.tensor([0, 0, 0, 0, 0, 0])


def test_categorical_saturated_outputs_are_finite():
    family = Categorical()
    f, y = saturated()
    factor = family.factor(f, y)
    assert bool(torch.isfinite(factor.root).all())
    assert bool(torch.isfinite(factor.residual).all())
    b = torch.full_like(factor.residual, 0.1)
    assert bool(torch.isfinite(family.shift(f, y, b)).all())
    assert bool(torch.isfinite(family.whiten(f, y, family.residual(f, y))).all())
    assert bool(torch.isfinite(family.nll(f, y)).all())


@pytest.mark.parametrize("family", ["categorical", "bernoulli"])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("penalty", [1e-6, 1e-2])
def test_saturated_model_gives_no_nan(family, solver, penalty):
    """Outputs of +-1000, right and wrong: every per-sample value exists."""
    scale = double(1.0, -1.0, 1000.0, -1000.0, 30.0, -30.0, 690.0, -690.0)[:, None]
    x = torch.cat([scale, scale / 7], dim=1).repeat(3, 1)
    y = (torch.arange(24) % 2 == 0).long()
    y[16:] = 1 - y[16:]
    outputs = 1 if family == "bernoulli" else 3
    model = torch.nn.Linear(2, outputs).double()
    with torch.no_grad():
        model.weight.copy_(double([1.0, 0.0], [-0.5, 0.1], [0.2, 0.3])[:outputs])
    likelihood_ = make_family(family, y, outputs)
    problem = make_problem(model, x, likelihood_.check(y, outputs), likelihood_)
    d = {name: torch.full_like(p.detach(), penalty) for name, p in problem.params.items()}
    variance = SOLVERS[solver].solve(problem, d)
    v = problem.factor.residual
    for values in (estimates.soft_rank(variance), estimates.tic(variance, v)):
        assert bool(torch.isfinite(values).all())
        assert bool((values >= 0).all())
    left_out = estimates.loo(variance, v, likelihood_, problem.outputs, problem.y)
    if left_out is not None:
        assert bool(torch.isfinite(left_out.outputs).all())


@pytest.mark.parametrize("log10", [-306, -100, -20])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_tiny_probability_of_another_class_is_harmless(log10, solver):
    """The third class at 1e-306 adds next to nothing: the other two are the two-class model."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (30,), generator=generator)
    w = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    found = []
    for classes in (2, 3):
        model = torch.nn.Linear(2, classes).double()
        with torch.no_grad():
            model.weight.zero_()
            model.weight[:2] = w
            model.bias.zero_()
            if classes == 3:
                model.bias[2] = log10 * math.log(10)
        family = Categorical()
        problem = make_problem(model, x, y, family)
        d = {name: torch.full_like(p.detach(), 0.05) for name, p in problem.params.items()}
        variance = SOLVERS[solver].solve(problem, d)
        v = problem.factor.residual
        left_out = estimates.loo(variance, v, family, problem.outputs, problem.y)
        found.append((estimates.soft_rank(variance), estimates.tic(variance, v), left_out.psi))
    for two, three in zip(*found, strict=True):
        torch.testing.assert_close(three, two, rtol=1e-11, atol=0)


@pytest.mark.parametrize("log10", [-7, -12, -30, -300])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_tiny_probability_of_the_true_label(log10, solver):
    """One grossly wrong sample: its leave-one-out loss against the definition, to 2e-6.

    The floor on the probability costs 6e-7; without it float64 is off by .1 at p = 1e-15.
    """
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(25, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (25,), generator=generator)
    model = torch.nn.Linear(3, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 3, generator=generator) / 2)
        model.bias.zero_()
        # Sample 0 lies along the first axis alone, where its own class is ruled out.
        x[0] = double(-log10 * math.log(10) / 4, 0.0, 0.0)
        model.weight[:, 0] = double(-2.0, 2.0, 0.0)
        y[0] = 0
    x[1:, 0] /= 10
    family = Categorical()
    problem = make_problem(model, x, y, family)
    d = {name: torch.full_like(p.detach(), 3.0) for name, p in problem.params.items()}
    variance = SOLVERS[solver].solve(problem, d)
    v = problem.factor.residual
    left_out = estimates.loo(variance, v, family, problem.outputs, problem.y)
    exact = dense(model, x, y, "categorical", d)
    assert float(torch.softmax(problem.outputs, dim=1)[0, 0]) < 1e-6
    torch.testing.assert_close(left_out.psi[1:], exact.loo[1:], rtol=1e-6, atol=1e-9)
    assert left_out.psi[0].item() == pytest.approx(exact.loo[0].item(), rel=2e-6)


# --- choosing and checking ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "outputs", "wanted"),
    [
        (torch.tensor([0, 1, 2]), 3, "categorical"),
        (torch.tensor([[0], [1], [2]]), 3, "categorical"),
        (torch.tensor([False, True]), 2, "categorical"),
        (torch.tensor([0, 1]), 1, "bernoulli"),
        (torch.tensor([True, True]), 1, "bernoulli"),
        (double(0.0, 1.0), 1, "gaussian"),
        (double([0.5, 1.0]), 2, "gaussian"),
        (double(0.0, 3.0), 1, "gaussian"),
    ],
)
def test_auto(y, outputs, wanted):
    assert make_family("auto", y, outputs).name == wanted


@pytest.mark.parametrize(
    ("y", "outputs"),
    [(torch.tensor([0, 7]), 1), (torch.tensor([1, 2]), 1), (torch.tensor([[0, 1], [1, 0]]), 2)],
)
def test_auto_never_guesses_counts(y, outputs):
    with pytest.raises(InputError, match=r"expected .* got .*family="):
        make_family("auto", y, outputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_named(name):
    assert make_family(name, torch.tensor([0, 1]), 2).name == name


REFUSED = [
    ("categorical", torch.tensor([0, 3]), 3, "labels 0..2"),
    ("categorical", torch.tensor([-1, 1]), 3, "labels 0..2"),
    ("categorical", torch.tensor([0, 1]), 1, "family=bernoulli"),
    ("categorical", double(0.0, 0.5), 3, "integer class labels"),
    ("categorical", double(0.0, math.nan), 3, "integer class labels"),
    ("categorical", torch.tensor([[0, 1], [1, 0]]), 2, "one-hot"),
    ("bernoulli", torch.tensor([0, 2]), 1, "labels 0 and 1"),
    ("bernoulli", torch.tensor([-1, 1]), 1, "labels 0 and 1"),
    ("bernoulli", torch.tensor([0, 1]), 2, "family=categorical"),
    ("bernoulli", double(0.0, 0.5), 1, "integer class labels"),
    ("gaussian", double(0.0, math.nan), 1, "finite targets"),
    ("gaussian", double(0.0, math.inf), 1, "finite targets"),
    ("gaussian", double(0.0, 1.0), 2, "2 column(s)"),
    ("poisson", double(0.0, -1.0), 1, "counts"),
    ("poisson", double(0.0, 0.5), 1, "counts"),
]


@pytest.mark.parametrize(("name", "y", "outputs", "part"), REFUSED)
def test_refused_targets(name, y, outputs, part):
    with pytest.raises(InputError) as caught:
        make_family(name, y, outputs).check(y, outputs)
    message = str(caught.value)
    assert all(word in message for word in ("expected", "got", part))
    assert ";" in message
    assert "\n" not in message


def test_unknown_family():
    with pytest.raises(InputError, match="unknown family 'gamma'; choose one of: auto, categ"):
        make_family("gamma", torch.tensor([0, 1]), 1)


@pytest.mark.parametrize("dispersion", [0.0, -1.0, math.nan, math.inf])
def test_bad_dispersion(dispersion):
    with pytest.raises(InputError, match="dispersion above 0"):
        Gaussian(dispersion)


def test_log_probabilities():
    f, _ = drawn("categorical", 4)
    torch.testing.assert_close(
        log_probabilities(Categorical(), f).exp().sum(dim=1), torch.ones(30).double()
    )
    one = log_probabilities(Bernoulli(), double([800.0], [-800.0], [0.0]))
    assert one.tolist() == [[-800.0, 0.0], [0.0, -800.0], [math.log(0.5)] * 2]
    assert log_probabilities(Gaussian(), f) is None
    assert log_probabilities(Poisson(), f) is None
