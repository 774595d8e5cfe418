"""The matrix-free solvers against the dense definition: values, stated errors, restarts."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from scipy.stats import binom

from flataudit import estimates
from flataudit.checkpoint import FolderCheckpoint
from flataudit.errors import InputError, NumericalError
from flataudit.solvers import MATRIX_FREE, SOLVERS, Work
from flataudit.solvers.lanczos import Lanczos
from flataudit.solvers.lanczos import _Run as LanczosRun
from flataudit.solvers.operator import CurvatureOperator
from flataudit.solvers.refinement import largest_ratio
from flataudit.solvers.resume import problem_key
from flataudit.solvers.sampling import Sampling, _Run
from tests.case import Case, constant
from tests.cases import BY_NAME, CASES, build
from tests.dense import dense

# On cases this small the Krylov space is exhausted, so that lanczos is exact up to rounding. In
# singular problems the eigenvalue cut-offs of both sides differ.
LANCZOS_DEFAULT = 1e-8
LANCZOS = {"softmax_all_free": 1e-7, "collinear": 1e-7}
# Standard errors by which 300 samples' sums may be off: over 50 cases and 3 sums a 4.5 is seen in
# one run of 1,000.
SAMPLING = 4.5

MEDIUM = Case(  # N = 720, P = 1,235, a soft rank of about 200
    "medium",
    lambda: torch.nn.Sequential(torch.nn.Linear(30, 25), torch.nn.Tanh(), torch.nn.Linear(25, 10)),
    lambda: torch.randn(80, 30),
    lambda: torch.randint(0, 10, (80,)),
    penalty=constant(1e-3),
)


@cache
def medium():
    """The case, its exact functional variance and the exact soft rank and n TIC gap."""
    built = build(MEDIUM)
    found = SOLVERS["dual"].solve(built.problem, built.penalty)
    v = built.problem.factor.residual
    rank, tic = estimates.soft_rank(found), estimates.tic(found, v)
    return built, found, float(rank.sum()), float(tic.sum())


def exact_of(case):
    built = build(case)
    exact = dense(built.model, built.x, built.y, case.family, built.penalty, case.dispersion)
    return built, exact


# --- lanczos --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lanczos_equals_the_definition(case):
    built, exact = exact_of(case)
    tolerance = LANCZOS.get(case.name, LANCZOS_DEFAULT)
    found = Lanczos().solve(built.problem, built.penalty, Work(seed=1))
    for trace, wanted in (
        (found.soft_rank, float(exact.leverage.sum())),
        (found.tic, float(exact.tic.sum())),
    ):
        assert trace.value == pytest.approx(wanted, rel=tolerance)
        assert trace.monte_carlo_se <= 1e-6 * wanted
        assert trace.truncation <= 1e-3 * wanted
    n = built.problem.n_samples
    centred = found.tic.value / n - found.mean_gradient / n
    assert centred == pytest.approx(exact.centred_tic, rel=max(tolerance, 1e-7))
    assert found.rank_at(1.0) == pytest.approx(float(exact.leverage.sum()), rel=tolerance)
    assert found.notes == () or "derivatives" in found.notes[0]
    # Where nothing is left to the probes, the contributions are those of the samples.
    torch.testing.assert_close(found.soft_rank.rough, exact.leverage, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.tic.rough, exact.tic, rtol=1e-6, atol=1e-7)


def coarse() -> Lanczos:
    """Settings that leave much to the probes."""
    return Lanczos(tolerance=0.03, first=2, further=8)


def test_stated_errors_hold():
    """Twenty seeds, two traces: inside 95 % intervals as often as the binomial law allows."""
    built, _, rank, tic = medium()
    inside, errors = 0, []
    for seed in range(20):
        found = coarse().solve(built.problem, built.penalty, Work(seed=seed))
        for trace, wanted in ((found.soft_rank, rank), (found.tic, tic)):
            assert trace.monte_carlo_se > 1e-4 * wanted  # there is something to state
            stated = 1.96 * trace.monte_carlo_se + trace.truncation
            assert stated <= 0.0301 * trace.value
            inside += abs(trace.value - wanted) <= stated
            errors.append(abs(trace.value - wanted) / wanted)
    assert inside >= binom.ppf(0.001, 40, 0.95)
    assert max(errors) < 0.05


def test_half_converged_directions_are_made_up_for():
    """Deflating them early neither biases the traces nor widens what is stated."""
    built, _, rank, tic = medium()
    loose = Lanczos(tolerance=0.03, first=8, further=16, deflation=0.3)
    inside = 0
    for seed in range(12):
        found = loose.solve(built.problem, built.penalty, Work(seed=seed))
        for trace, wanted in ((found.soft_rank, rank), (found.tic, tic)):
            assert trace.truncation < 0.01 * wanted
            stated = 1.96 * trace.monte_carlo_se + trace.truncation
            inside += abs(trace.value - wanted) <= stated
    assert inside >= binom.ppf(0.001, 24, 0.95)


def test_lanczos_is_within_a_percent():
    built, _, rank, tic = medium()
    for seed in range(3):
        found = Lanczos().solve(built.problem, built.penalty, Work(seed=seed))
        assert found.soft_rank.value == pytest.approx(rank, rel=0.01)
        assert found.tic.value == pytest.approx(tic, rel=0.01)


def test_samples_that_carry_tic_are_known():
    """Theirs is known by quadrature; that of the others has the probes' noise."""
    built, exact, _, _ = medium()
    v = built.problem.factor.residual
    wanted = estimates.tic(exact, v)
    found = coarse().solve(built.problem, built.penalty, Work(seed=2)).tic
    size = v.square().sum(dim=1)
    off = (found.rough - wanted).abs() / wanted
    known = size.argsort(descending=True)[:2]
    assert float(off[known].max()) <= found.truncation / float(wanted[known].sum())
    assert float(off[known].max()) < 0.01
    rest = torch.ones(len(off), dtype=torch.bool)
    rest[known] = False
    assert float(off[rest].median()) > 0.01
    assert abs(found.value - float(wanted.sum())) <= 3 * found.monte_carlo_se + found.truncation


@pytest.mark.parametrize("n", [1, 2, 3])
def test_lanczos_of_a_few_samples(n):
    """Half of them at most are known beforehand: the probes have something left, if only one."""
    case = Case("few", MEDIUM.model, lambda: torch.randn(n, 30), lambda: torch.randint(0, 10, (n,)))
    built, exact = exact_of(case)
    found = Lanczos().solve(built.problem, built.penalty, Work())
    assert found.soft_rank.value == pytest.approx(float(exact.leverage.sum()), rel=1e-8)
    assert found.tic.value == pytest.approx(float(exact.tic.sum()), rel=1e-8)


def test_spread_over_samples_is_debiased():
    """sd(l + psi) from noisy contributions is near that of the exact ones."""
    built, exact, _, _ = medium()
    problem = built.problem
    nll = problem.family.nll(problem.outputs, problem.y)
    found = coarse().solve(problem, built.penalty, Work(seed=0))
    for measure in (
        estimates.measure_soft_rank,
        lambda c: estimates.measure_tic(c, problem.factor.residual),
    ):
        wanted = measure(exact).estimate(nll)
        got = measure(found).estimate(nll)
        assert got.se == pytest.approx(wanted.se, rel=0.1)
        assert got.monte_carlo_se > 0
        assert wanted.monte_carlo_se is None


def test_rank_at_other_penalties():
    """One run's spectral density gives the soft rank at D/c."""
    built, _, _, _ = medium()
    found = Lanczos().solve(built.problem, built.penalty, Work(seed=0))
    for c in (0.3, 1.0, 3.0):
        penalty = {name: d / c for name, d in built.penalty.items()}
        exact = SOLVERS["dual"].solve(built.problem, penalty)
        wanted = float(estimates.soft_rank(exact).sum())
        assert found.rank_at(c) == pytest.approx(wanted, rel=0.02)


def test_a_basis_too_small_is_said_and_counted():
    built, _, rank, _ = medium()
    solver = Lanczos(max_basis=40, first=8, max_probes=32)
    found = solver.solve(built.problem, built.penalty, Work())
    assert any("Krylov space reached" in note for note in found.notes)
    assert any("was asked for" in note for note in found.notes)
    stated = 3 * found.soft_rank.monte_carlo_se + found.soft_rank.truncation
    assert abs(found.soft_rank.value - rank) <= stated


def test_known_samples_in_a_space_that_is_full():
    """Their quadratures are too large by a small part of their bound, a fifth of TIC here."""
    built, _, _, tic = medium()
    solver = Lanczos(max_basis=240, first=20, further=8, tolerance=0.02)
    inside = 0
    for seed in range(12):
        operator = CurvatureOperator(built.problem, built.penalty)
        run = LanczosRun(solver, built.problem, operator, built.penalty, Work(seed=seed))
        found = run.result().tic
        bound = float(run.known.residuals.square().sum())
        assert bound > 0.1 * tic
        assert found.truncation < 0.05 * bound
        stated = 1.96 * found.monte_carlo_se + found.truncation
        assert stated <= 0.0201 * found.value
        assert abs(float(found.rough.sum()) - found.value) < 0.05 * tic
        inside += abs(found.value - tic) <= stated
    assert inside >= binom.ppf(0.001, 12, 0.95)


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_samples_are_unbiased(case):
    """Sums over samples within their standard error of the dense definition."""
    built, exact = exact_of(case)
    problem = built.problem
    v = problem.factor.residual
    solver = Sampling(block=300, most=300, residual=1e-6)
    found = solver.solve(problem, built.penalty, Work(seed=5))
    for measured, wanted in (
        (estimates.measure_soft_rank(found), float(exact.leverage.mean())),
        (estimates.measure_tic(found, v), float(exact.tic.mean())),
    ):
        # the jackknife of 32 groups alone would be too rough for so many cases
        error = max(measured.monte_carlo_se, wanted * math.sqrt(2 / 300) / 3)
        assert abs(measured.gap - wanted) <= SAMPLING * error
        assert measured.psi.shape == (problem.n_samples,)
    n = problem.n_samples
    assert found.mean_gradient == pytest.approx(
        n * (float(exact.tic.mean()) - exact.centred_tic), rel=1e-4, abs=1e-9
    )
    assert found.truncation < 1e-4


@pytest.mark.parametrize("name", ["mlp_tanh_wide", "ridge", "poisson_outputs", "layernorm"])
def test_sampled_leave_one_out_is_unbiased(name):
    """The mean over independent runs of s = 48 samples approaches the exact gap."""
    built, exact = exact_of(BY_NAME[name])
    problem = built.problem
    gaps = []
    for seed in range(30):
        found = Sampling(block=48, most=48).solve(problem, built.penalty, Work(seed=seed))
        v = problem.factor.residual
        left_out = estimates.measure_loo(found, v, problem.family, problem.outputs, problem.y)
        assert left_out is not None
        gaps.append(left_out[1].gap)
    values = torch.tensor(gaps).double()
    wanted = float(exact.loo.mean())
    error = float(values.std()) / math.sqrt(len(gaps))
    assert abs(float(values.mean()) - wanted) <= 4 * error
    assert error < 0.1 * wanted


def test_sampling_is_within_five_percent():
    built, exact, rank, tic = medium()
    problem, v = built.problem, built.problem.factor.residual
    wanted = estimates.measure_loo(exact, v, problem.family, problem.outputs, problem.y)
    found = Sampling().solve(problem, built.penalty, Work(seed=0))
    got = estimates.measure_loo(found, v, problem.family, problem.outputs, problem.y)
    assert got[1].gap == pytest.approx(wanted[1].gap, rel=0.05)
    assert estimates.measure_soft_rank(found).gap * 80 == pytest.approx(rank, rel=0.05)
    assert estimates.measure_tic(found, v).gap * 80 == pytest.approx(tic, rel=0.05)
    assert estimates.largest_leverage(found) <= 1.0


def hard(free: tuple[str, ...] = ()):
    """Leverages near 1: more outputs than the samples can hold down, at a small penalty."""
    case = Case(
        "hard",
        lambda: torch.nn.Sequential(
            torch.nn.Linear(20, 15), torch.nn.Tanh(), torch.nn.Linear(15, 5)
        ),
        lambda: torch.randn(60, 20) * torch.linspace(0.2, 4.0, 60)[:, None],
        lambda: torch.randint(0, 5, (60,)),
        penalty=constant(1e-4, free),
    )
    return build(case)


@pytest.mark.parametrize("free", [(), ("bias",)])
def test_refined_samples_are_exact(free):
    """Their I - Q_i is the exact solver's, within the residual's bound; the others are sampled."""
    built = hard(free)
    problem = built.problem
    exact = SOLVERS["dual"].solve(problem, built.penalty)
    solver = Sampling()
    run = _Run(
        solver, problem, CurvatureOperator(problem, built.penalty), built.penalty, Work(seed=0)
    )
    found = run.result()
    assert 0 < len(run.refined) < problem.n_samples
    wanted = exact.complement[run.refined]
    error = largest_ratio((found.complement[run.refined] - wanted).abs(), wanted)
    assert error <= 0.01
    torch.testing.assert_close(
        found.q[run.refined], torch.eye(4).double() - found.complement[run.refined]
    )
    for each in found.replicates:
        assert torch.equal(each.complement[run.refined], found.complement[run.refined])


def test_leave_one_out_where_leverages_are_near_one():
    """Where plain samples would be far off, and biased: error and coverage over seeds."""
    built = hard()
    problem, v = built.problem, built.problem.factor.residual

    def gap(variance):
        found = estimates.measure_loo(variance, v, problem.family, problem.outputs, problem.y)
        return found[1]

    exact = SOLVERS["dual"].solve(problem, built.penalty)
    assert estimates.largest_leverage(exact) > 0.95
    wanted = gap(exact).gap
    inside, errors = 0, []
    for seed in range(12):
        got = gap(Sampling().solve(problem, built.penalty, Work(seed=seed)))
        errors.append(abs(got.gap / wanted - 1.0))
        inside += abs(got.gap - wanted) <= 1.96 * got.monte_carlo_se + got.truncation
    assert max(errors) < 0.05
    assert inside >= binom.ppf(0.001, 12, 0.95)


def test_budget_ends_refinement():
    built = hard()
    found = Sampling(most=256, tolerance=0.002).solve(built.problem, built.penalty, Work())
    assert any("leave-one-out gap has a standard error" in note for note in found.notes)


def test_unconverged_systems_are_an_error():
    built, _, _, _ = medium()
    with pytest.raises(NumericalError, match=r"expected conjugate gradients to reach .*, got"):
        Sampling(iterations=2).solve(built.problem, built.penalty, Work())


def test_too_few_samples_are_said():
    built, _, _, _ = medium()
    found = Sampling(most=96, block=96, tolerance=1e-3).solve(built.problem, built.penalty, Work())
    assert any("was asked for" in note for note in found.notes)


# --- both -----------------------------------------------------------------------------------------

SETTINGS = {"lanczos": coarse(), "sampling": Sampling(block=32, most=64)}
solvers = pytest.mark.parametrize("name", sorted(SETTINGS))


def values(curvature) -> tuple[float, float, float]:
    v = medium()[0].problem.factor.residual
    return (
        estimates.measure_soft_rank(curvature).gap,
        estimates.measure_tic(curvature, v).gap,
        curvature.mean_gradient,
    )


@solvers
def test_deterministic_by_seed(name):
    built, _, _, _ = medium()
    first, again, other = (
        values(SETTINGS[name].solve(built.problem, built.penalty, Work(seed=seed)))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first[0] != other[0]


@solvers
@pytest.mark.parametrize("chunk_size", [7, 80])
def test_chunk_size_changes_nothing(name, chunk_size):
    built, cut = medium()[0], build(MEDIUM, chunk_size=chunk_size)
    whole = values(SETTINGS[name].solve(built.problem, built.penalty, Work(seed=1)))
    parts = values(SETTINGS[name].solve(cut.problem, cut.penalty, Work(seed=1)))
    assert parts == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", ["mlp_tanh_wide", "mlp_free_biases"])
def test_duplicated_data_halves_the_gap(name):
    """Exact to rounding by lanczos, whose space is exhausted: soft rank and n TIC gap stay."""
    once, twice = (build(BY_NAME[name], copies=copies) for copies in (1, 2))
    a, b = (Lanczos().solve(each.problem, each.penalty, Work()) for each in (once, twice))
    assert b.soft_rank.value == pytest.approx(a.soft_rank.value, rel=1e-7)
    assert b.tic.value == pytest.approx(a.tic.value, rel=1e-7)
    gaps = [estimates.measure_soft_rank(each).gap for each in (a, b)]
    assert gaps[1] == pytest.approx(gaps[0] / 2, rel=1e-7)


@solvers
def test_progress_counts_products(name):
    built, _, _, _ = medium()
    seen = []
    SETTINGS[name].solve(
        built.problem,
        built.penalty,
        Work(tick=lambda done, expected: seen.append((done, expected))),
    )
    done = [d for d, _ in seen]
    assert len(seen) > 5
    assert done == sorted(done)
    assert all(e >= d for d, e in seen)
    assert seen[-1][1] <= 1.5 * seen[-1][0]  # the last forecast is near what it took


class Interrupts:
    """Raises KeyboardInterrupt after so many ticks."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, done: int, expected: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@solvers
@pytest.mark.parametrize("after", [1, 4, 8, 23, 24])  # at 23 and 24 lanczos settles
def test_interrupted_run_resumes_where_it_was(name, after, tmp_path):
    built, _, _, _ = medium()
    solver = SETTINGS[name]
    counts = []

    def count(done, expected):
        counts.append(done)

    whole = values(solver.solve(built.problem, built.penalty, Work(seed=1, tick=count)))
    with pytest.raises(KeyboardInterrupt):
        solver.solve(
            built.problem,
            built.penalty,
            Work(seed=1, tick=Interrupts(after), checkpoint=FolderCheckpoint(tmp_path)),
        )
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".pt"
    again = []
    resumed = solver.solve(
        built.problem,
        built.penalty,
        Work(seed=1, tick=lambda d, e: again.append(d), checkpoint=FolderCheckpoint(tmp_path)),
    )
    assert values(resumed) == pytest.approx(whole, rel=1e-9)
    assert again == counts[after:]  # nothing twice
    # Finished: the stored result is taken, no product is made.
    third = []
    finished = solver.solve(
        built.problem,
        built.penalty,
        Work(seed=1, tick=lambda d, e: third.append(d), checkpoint=FolderCheckpoint(tmp_path)),
    )
    assert third == []
    assert values(finished) == values(resumed)


def test_key_tells_problems_apart():
    built = build(BY_NAME["mlp_tanh_wide"])
    other = build(BY_NAME["mlp_tanh_wide"], copies=2)
    base = problem_key(built.problem, built.penalty, 0, Lanczos())
    doubled = {name: 2 * d for name, d in built.penalty.items()}
    keys = {
        base,
        problem_key(other.problem, other.penalty, 0, Lanczos()),
        problem_key(built.problem, doubled, 0, Lanczos()),
        problem_key(built.problem, built.penalty, 1, Lanczos()),
        problem_key(built.problem, built.penalty, 0, Lanczos(tolerance=0.1)),
        problem_key(built.problem, built.penalty, 0, Sampling()),
    }
    assert len(keys) == 6
    assert base == problem_key(build(BY_NAME["mlp_tanh_wide"]).problem, built.penalty, 0, Lanczos())


def test_damaged_checkpoint_starts_anew(tmp_path):
    built, _, _, _ = medium()
    keeper = FolderCheckpoint(tmp_path)
    key = problem_key(built.problem, built.penalty, 1, SETTINGS["lanczos"])
    keeper.save(key, lambda: {"round": torch.tensor(1)}, last=True)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert keeper.load(key) is None
    work = Work(seed=1, checkpoint=keeper)
    found = SETTINGS["lanczos"].solve(built.problem, built.penalty, work)
    assert values(found) == values(
        SETTINGS["lanczos"].solve(built.problem, built.penalty, Work(seed=1))
    )


def test_checkpoint_folder_must_be_writable(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="expected checkpoint to be a folder"):
        FolderCheckpoint(file)


@solvers
def test_plan_grows_with_samples_not_with_the_jacobian(name):
    small, large = build(MEDIUM), build(MEDIUM, copies=40)
    plans = [MATRIX_FREE[name].plan(b.problem, b.penalty) for b in (small, large)]
    rows = large.problem.n_rows - small.problem.n_rows
    assert plans[0] < plans[1]
    # vectors over the rows: at most 3 bases of 1,024 columns, never rows x parameters beyond
    assert plans[1] - plans[0] <= 8 * rows * 4000
