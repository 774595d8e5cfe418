"""The factorisations under the solvers, on matrices whose inverse is known."""

from __future__ import annotations

import pytest
import torch

from flataudit.errors import NumericalError
from flataudit.solvers.base import pseudo_inverse_root
from flataudit.solvers.dual import inverse_factor
from flataudit.solvers.triangular import invert_lower_


def positive(n: int) -> torch.Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return a @ a.T / n + torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 30, 1300])
def test_inverse_factor_reads_the_upper_triangle(n):
    """X' with X = L^-1, M = L L', whatever stands below the diagonal."""
    m = positive(n)
    given = torch.triu(m) + torch.tril(torch.full_like(m, 9.0), -1)
    x = inverse_factor(given)
    torch.testing.assert_close(x, torch.linalg.inv(torch.linalg.cholesky(m)).T)
    torch.testing.assert_close(x @ x.T, torch.linalg.inv(m))


@pytest.mark.parametrize("n", [1, 7, 513, 1300, 2050])
def test_invert_lower(n):
    """In place, by halves and blocks, for sizes that no block divides."""
    lower = torch.linalg.cholesky(positive(n))
    wanted = torch.linalg.solve_triangular(lower, torch.eye(n, dtype=torch.float64), upper=False)
    invert_lower_(lower)
    torch.testing.assert_close(lower, wanted, rtol=1e-10, atol=1e-12)


def test_indefinite_matrix_is_a_numerical_error():
    m = positive(5)
    m[2, 2] = -4.0
    with pytest.raises(NumericalError, match=r"expected a positive definite .* row 3; likely"):
        inverse_factor(m)


def test_pseudo_inverse_root():
    a = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    root = pseudo_inverse_root(a @ a.T)
    assert root.shape == (6, 4)
    # On the range of A A' any generalised inverse is the same.
    torch.testing.assert_close(a.T @ root @ root.T @ a, torch.eye(4, dtype=torch.float64))
    assert pseudo_inverse_root(torch.zeros(3, 3, dtype=torch.float64)).shape == (3, 0)
    assert pseudo_inverse_root(torch.zeros(0, 0, dtype=torch.float64)).shape == (0, 0)
