"""The matrix-free curvature: v -> K v with K = B1 D1^-1 B1', by one VJP and one JVP over the data.

B = S'J/sqrt(n) has N = n K' rows (`flataudit.curvature.problem`); B1 are its penalised columns, B0
the unpenalised ones. With Q0 an orthonormal basis of the range of B0 and Pi = I - Q0 Q0', the
functional variance of all samples together is

    B (G + D)^+ B' = Q0 Q0' + Pi f(Pi K Pi) Pi,    f(x) = x/(1 + x)

(the generalised inverse of Pi (I + K) Pi is that of universal kriging's explicit basis), so a
solver needs Pi K Pi v alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flataudit.curvature.problem import Problem
from flataudit.solvers.free import free_bytes, free_directions, free_parameters
from flataudit.solvers.passes import VECTORS, Passes, Tensors, groups, working_bytes


class CurvatureOperator:
    """Pi K Pi as a product with blocks of vectors (N, m), float64.

    problem, penalty: as for every solver; each parameter tensor is penalised throughout or free
    throughout. dtype: of the network's arithmetic; vectors and sums stay float64.

    tied: names of the penalised parameters; free: the directions of the others; reason: why a
    slower route is used, or None; applications: vectors multiplied so far, the unit of cost.

    Raises:
        NumericalError: the network's derivatives in two modes disagree.
    """

    def __init__(
        self,
        problem: Problem,
        penalty: Mapping[str, Tensor],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        free = [name for name in problem.params if not bool(penalty[name].any())]
        self.tied = [name for name in problem.params if name not in free]
        self._inverse = {name: penalty[name].to(torch.float64).reciprocal() for name in self.tied}
        self.applications = 0
        self._passes = Passes(problem, self.tied, dtype=dtype)
        self.reason = self._passes.reason
        self.free = free_directions(problem, free, dtype=dtype)

    def project(self, v: Tensor) -> Tensor:
        """Pi v."""
        return self.free.project(v) if self.free.rank else v

    def __call__(self, v: Tensor) -> Tensor:
        """Pi K Pi v, (N, m)."""
        out = torch.zeros_like(v)
        if self.tied:
            for group in groups(v.shape[1]):  # so that no more vectors of parameters are held
                pulled = self.pull(self.project(v[:, group]))
                for name, u in pulled.items():
                    u.mul_(self._inverse[name])
                out[:, group] = self.project(self._passes.push(pulled))
        return out

    def half(self, u: Mapping[str, Tensor]) -> Tensor:
        """Pi B1 D1^-1/2 u for u (m, *shape) by parameter: (N, m)."""
        parts = []
        for group in groups(len(next(iter(u.values())))):
            scaled = {name: t[group] * self._inverse[name].sqrt() for name, t in u.items()}
            parts.append(self._passes.push(scaled))
        return self.project(torch.cat(parts, dim=1))

    def pull(self, v: Tensor) -> Tensors:
        """B1'v for v (N, m): by parameter (m, *shape), float64."""
        self.applications += v.shape[1]
        return self._passes.pull(v)

    def pulled_squares(self, v: Tensor) -> Tensor:
        """|B1'v|^2 for each column of v (N, m): (m,); over random signs, tr(B1'B1) on average."""
        parts = [
            torch.stack([t.flatten(1).square().sum(dim=1) for t in self.pull(v[:, group]).values()])
            for group in groups(v.shape[1])
        ]
        return torch.cat(parts, dim=1).sum(dim=0)


def operator_bytes(problem: Problem, penalty: Mapping[str, Tensor], m: int) -> int:
    """Planned peak bytes of one product with m vectors, and of the free parameters' directions."""
    n_tied = problem.n_params - free_parameters(problem, penalty)
    vectors = 8 * problem.n_rows * 2 * m + free_bytes(problem, penalty, m)
    together = min(m, VECTORS)
    working = working_bytes(together, n_tied, problem.device)
    return 3 * 8 * together * n_tied + vectors + 3 * working
