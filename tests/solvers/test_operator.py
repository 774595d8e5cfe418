"""The matrix-free operator on every case, against the matrix it stands for."""

from __future__ import annotations

import pytest
import torch

from flataudit.solvers.operator import CurvatureOperator
from tests.cases import BY_NAME, CASES, build

TOLERANCE = 1e-11  # of the matrix's largest entry

# Where forward mode, or vmap, has no rule, or a wrong one: the route taken and why.
SLOWER = {
    "embedding_bag": "with the Jacobian's rows, since the batched derivatives fail: NotImpl",
    "weight_norm": "one vector at a time, since the batched derivatives fail: NotImplemented",
    "text_classifier": "the forward mode is not the transpose of the reverse mode",
    "text_padding_pooled": "the forward mode is not the transpose of the reverse mode",
}


def parts(built):
    """B (N, P), the penalties (P,), Pi and Pi K Pi, dense."""
    problem = built.problem
    rows = problem.rows(slice(0, problem.n_samples)).flatten(0, 1)
    d = torch.cat([built.penalty[name].flatten() for name in problem.params])
    tied = d > 0
    u, s, _ = torch.linalg.svd(rows[:, ~tied], full_matrices=False)
    basis = u[:, s > 1e-10 * s.max()] if len(s) else u
    pi = torch.eye(problem.n_rows).double() - basis @ basis.T
    k = (rows[:, tied] / d[tied]) @ rows[:, tied].T
    return rows, d, pi, pi @ k @ pi


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_is_the_projected_gram_matrix(case):
    built = build(case)
    _, _, pi, wanted = parts(built)
    operator = CurvatureOperator(built.problem, built.penalty)
    eye = torch.eye(built.problem.n_rows).double()
    got = operator(eye)
    scale = float(wanted.abs().max())
    assert float((got - wanted).abs().max()) <= TOLERANCE * scale
    assert float((operator.project(eye) - pi).abs().max()) <= 1e-10
    assert operator.applications == (built.problem.n_rows if operator.tied else 0)
    if case.name in SLOWER:
        assert SLOWER[case.name] in operator.reason
    else:
        assert operator.reason is None


@pytest.mark.parametrize(
    "name", ["mlp_free_biases", "layernorm", "softmax_all_free", "collinear", "mlp_elementwise"]
)
def test_explicit_basis_form(name):
    """Q0 Q0' + Pi f(Pi K Pi) Pi is B (G + D)^+ B', also where free directions are dependent."""
    built = build(BY_NAME[name])
    rows, d, _, _ = parts(built)
    operator = CurvatureOperator(built.problem, built.penalty)
    eye = torch.eye(built.problem.n_rows).double()
    k = operator(eye)
    got = operator.free.basis @ operator.free.basis.T + torch.linalg.solve(eye + k, k)
    inverse = torch.linalg.pinv(rows.T @ rows + torch.diag(d), hermitian=True, rtol=1e-12)
    torch.testing.assert_close(got, rows @ inverse @ rows.T, rtol=0, atol=1e-9)


def test_half_is_a_root_of_the_operator():
    """Pi B1 D1^-1/2, whose product with its transpose is the operator."""
    built = build(BY_NAME["mlp_elementwise"])
    operator = CurvatureOperator(built.problem, built.penalty)
    names, sizes = zip(*((k, p.numel()) for k, p in built.problem.params.items()), strict=True)
    columns = torch.eye(sum(sizes)).double().split(list(sizes), dim=1)
    units = {
        name: part.reshape(-1, *built.problem.params[name].shape)
        for name, part in zip(names, columns, strict=True)
    }
    half = operator.half(units)
    wanted = operator(torch.eye(built.problem.n_rows).double())
    torch.testing.assert_close(half @ half.T, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
@pytest.mark.parametrize("name", ["mlp_free_biases", "convolutions", "gru", "data_dependent"])
def test_chunk_size_changes_nothing(name, chunk_size):
    whole, cut = build(BY_NAME[name]), build(BY_NAME[name], chunk_size=chunk_size)
    v = torch.randn(whole.problem.n_rows, 3, generator=torch.Generator().manual_seed(0)).double()
    a = CurvatureOperator(whole.problem, whole.penalty)(v)
    b = CurvatureOperator(cut.problem, cut.penalty)(v)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_duplicated_data_keeps_the_spectrum():
    """Every sample twice: the nonzero eigenvalues of K, of a mean loss, stay as they are."""
    spectra = []
    for copies in (1, 2):
        built = build(BY_NAME["mlp_tanh_wide"], copies=copies)
        eye = torch.eye(built.problem.n_rows).double()
        k = CurvatureOperator(built.problem, built.penalty)(eye)
        spectra.append(torch.linalg.eigvalsh((k + k.T) / 2).flip(0))
    once, twice = spectra
    torch.testing.assert_close(twice[: len(once)], once, rtol=1e-10, atol=1e-10)
    assert float(twice[len(once) :].abs().max()) < 1e-10


def test_float32_arithmetic_has_float32_errors():
    built = build(BY_NAME["batchnorm_2d"])  # its buffers have to follow
    v = torch.randn(built.problem.n_rows, 4, generator=torch.Generator().manual_seed(0)).double()
    exact = CurvatureOperator(built.problem, built.penalty)(v)
    operator = CurvatureOperator(built.problem, built.penalty, dtype=torch.float32)
    got = operator(v)
    assert got.dtype == torch.float64
    error = float((got - exact).norm() / exact.norm())
    assert 1e-9 < error < 1e-5
    assert operator.reason is None
