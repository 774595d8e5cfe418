"""Block conjugate gradients, (I + K) X = B for many columns at once (Dubrulle 2001, BCGrQ).

The columns share one Krylov space, so that large eigenvalues of K cost no iterations of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]


def block_cg(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    converged: Callable[[Tensor, Tensor], bool],
    *,
    iterations: int,
    state: State | None = None,
    after_step: Callable[[State, int], None] = lambda state, step: None,
) -> Tensor:
    """X (N, m), from zero or from where `state` stands.

    apply: K, symmetric and positive semi-definite; right: B (N, m); converged: of X and C, whose
    columns are as long as the residuals', C'C = R'R; after_step: gets the state and its number.
    The recurrence's residual drifts from the true one, which the caller has to check.

    State: x solutions, q orthonormal residual directions, p search directions; residuals are q c.
    """
    if state is None:
        x = torch.zeros_like(right)
        q, c = torch.linalg.qr(right)
        p = q
    else:
        x, q, p, c = (state[name].to(right.device) for name in ("x", "q", "p", "c"))
    for step in range(iterations):
        if converged(x, c):
            break
        z = p + apply(p)
        gram = p.T @ z
        alpha = torch.linalg.solve((gram + gram.T) / 2, torch.eye(len(gram)).to(gram))
        x = x + p @ (alpha @ c)
        q, s = torch.linalg.qr(q - z @ alpha)
        c = s @ c
        p = q + p @ s.T
        after_step({"x": x, "q": q, "p": p, "c": c}, step + 1)
    return x
