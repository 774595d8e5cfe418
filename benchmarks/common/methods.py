"""What each library can do for soft rank, TIC and leave-one-out, by its own best path.

Every method takes a `Task` and returns the same quantities at the same penalty, in float64:
soft_rank tr(G (G + D)^-1), tic and loo as gaps in nats per example. The libraries end at different
places: a library that gives G, the Gram matrix or its square root is finished here with dense
torch.linalg in `finish_dual` or `finish_primal`, the plain way and the same for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.common.cases import N_CLASSES, PENALTY, Task
from flataudit import estimates
from flataudit.curvature.problem import Problem, make_problem
from flataudit.errors import InputError
from flataudit.families import Categorical, Factor
from flataudit.inputs import Inputs
from flataudit.models.torch import prepare
from flataudit.penalty import from_argument
from flataudit.solvers import SOLVERS, FunctionalVariance, choose
from flataudit.solvers.base import Work
from flataudit.solvers.kfac import Kfac
from flataudit.solvers.lanczos import Lanczos
from flataudit.solvers.operator import CurvatureOperator
from flataudit.solvers.sampling import Sampling

PROBES = 4
VECTORS = 8  # of a block, in products with the operators
CG_TOLERANCE = 1e-4


class Unsupported(Exception):
    """The library cannot do this case; the message says why."""


class NotApplicable(Exception):
    """Would repeat another method on this case; no row."""


@dataclass
class Outcome:
    """soft_rank, and the gaps by TIC and LOO in nats; None where the method has none."""

    soft_rank: float | None
    tic: float | None = None
    loo: float | None = None
    soft_rank_se: float | None = None
    tic_se: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Method:
    """kind: exact; estimate (converges to the exact value with more work); approximation;
    product (a step of an estimate)."""

    name: str
    library: str  # the distribution's name
    title: str
    kind: str
    run: Callable[[Task], Outcome]


# --- this project -------------------------------------------------------------------------------


def ours(task: Task, solver: str = "auto") -> Outcome:
    """One of this project's exact solvers, as `flataudit.audit` calls it."""
    started = time.perf_counter()
    problem = _problem(task)
    penalty = from_argument(PENALTY, problem.params)
    chosen = choose(solver, problem, penalty).name
    variance = SOLVERS[chosen].solve(problem, penalty)
    v = problem.factor.residual
    left_out = estimates.loo(variance, v, problem.family, problem.outputs, problem.y)
    return Outcome(
        float(estimates.soft_rank(variance).sum()),
        float(estimates.tic(variance, v).mean()),
        None if left_out is None else float(left_out.psi.mean()),
        stages={"all": time.perf_counter() - started},
        note=chosen,
    )


def ours_exact(task: Task) -> Outcome:
    if not task.case.exact:
        rows = min(task.n_rows, task.n_params)
        raise Unsupported(f"a matrix of side {rows} is left to the matrix-free solvers here")
    return ours(task)


def ours_other(task: Task) -> Outcome:
    """The exact solver that `auto` leaves, where P <= N and either comes into question."""
    if not _primal(task) or not task.case.exact:
        raise NotApplicable
    problem = _problem(task)
    taken = choose("auto", problem, from_argument(PENALTY, problem.params)).name
    return ours(task, "primal" if taken == "dual" else "dual")


def ours_sampling(task: Task) -> Outcome:
    """Posterior samples at the default tolerance: the one matrix-free method with leave-one-out."""
    started = time.perf_counter()
    problem = _problem(task)
    found = Sampling().solve(problem, from_argument(PENALTY, problem.params), Work())
    v = problem.factor.residual
    rank, energy = estimates.measure_soft_rank(found), estimates.measure_tic(found, v)
    left_out = estimates.measure_loo(found, v, problem.family, problem.outputs, problem.y)
    return Outcome(
        rank.gap * task.n,
        energy.gap,
        None if left_out is None else left_out[1].gap,
        soft_rank_se=(rank.monte_carlo_se or 0.0) * task.n,
        tic_se=energy.monte_carlo_se,
        stages={"all": time.perf_counter() - started},
    )


def ours_kfac(task: Task) -> Outcome:
    """curvlinops' factors, with B exact: the audit's --solver kfac."""
    started = time.perf_counter()
    problem = _problem(task)
    try:
        found = Kfac().solve(problem, from_argument(PENALTY, problem.params), Work())
    except InputError as error:
        raise Unsupported(f"{error}") from error
    v = problem.factor.residual
    left_out = estimates.measure_loo(found, v, problem.family, problem.outputs, problem.y)
    return Outcome(
        float(estimates.soft_rank(found).sum()),
        float(estimates.tic(found, v).mean()),
        None if left_out is None else left_out[1].gap,
        stages={"all": time.perf_counter() - started},
    )


def ours_lanczos(task: Task) -> Outcome:
    """Stochastic Lanczos quadrature in output space at its default tolerance."""
    started = time.perf_counter()
    problem = _problem(task)
    found = Lanczos().solve(problem, from_argument(PENALTY, problem.params), Work())
    rank, energy = found.soft_rank, found.tic
    return Outcome(
        rank.value,
        energy.value / task.n,
        soft_rank_se=rank.monte_carlo_se + rank.truncation,
        tic_se=(energy.monte_carlo_se + energy.truncation) / task.n,
        stages={"all": time.perf_counter() - started},
    )


def ours_product(task: Task) -> Outcome:
    """B'B v in output space, K v = B (B'v)/lambda for a block of vectors: z'K z lambda ~ tr(G)."""
    _matrix_free_alone(task)
    problem = _problem(task)
    operator = CurvatureOperator(problem, from_argument(PENALTY, problem.params))
    z = _signs(problem.n_rows)
    return _traces((z * operator(z)).sum(dim=0) * PENALTY)


def _matrix_free_alone(task: Task) -> None:
    """Products are compared where no method gets to the end."""
    if task.case.exact:
        raise NotApplicable


def _signs(rows: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 2, (rows, VECTORS)).double() * 2 - 1


def _traces(each: Tensor) -> Outcome:
    se = float(each.std()) / VECTORS**0.5
    return Outcome(None, note=f"tr G = {float(each.mean()):.4g} ± {se:.1g}")


def _problem(task: Task) -> Problem:
    prepared = prepare(task.model, Inputs.of(task.x), torch.device("cpu"))
    family = Categorical()
    return make_problem(prepared.module, Inputs.of(task.x), family.check(task.y, N_CLASSES), family)


# --- the common ends of the exact routes --------------------------------------------------------


def _outcome(task: Task, found: tuple[Tensor, Tensor], factor: Factor) -> Outcome:
    q, complement = found
    variance = FunctionalVariance(q, complement, 0.0, 0.0)
    family = Categorical()
    left_out = estimates.loo(variance, factor.residual, family, task.logits, task.y)
    return Outcome(
        float(estimates.soft_rank(variance).sum()),
        float(estimates.tic(variance, factor.residual).mean()),
        None if left_out is None else float(left_out.psi.mean()),
    )


def finish_dual(task: Task, gram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Q_i and I - Q_i from the Gram matrix B B' (N, N), samples first, k rows a sample.

    W = (B B'/lambda + I)^-1, Q_i = I - W_ii.
    """
    gram.div_(PENALTY).diagonal().add_(1.0)
    w = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    index = torch.arange(task.n)
    complement = w.view(task.n, k, task.n, k)[index, :, index]
    return torch.eye(k, dtype=w.dtype) - complement, complement


def finish_primal(task: Task, ggn: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same from G (P, P) and B (N, P): Q_i = B_i (G + lambda I)^-1 B_i'."""
    ggn.diagonal().add_(PENALTY)
    lower = torch.linalg.cholesky(ggn)
    half = torch.linalg.solve_triangular(lower, rows.T, upper=False).T.reshape(task.n, k, -1)
    q = half @ half.mT
    return q, torch.eye(k, dtype=q.dtype) - q


def _dense_fits(task: Task, entries: float, what: str) -> None:
    """Unsupported where one array of that many float64 entries is beyond any small machine."""
    if entries * 8 > 64e9:
        raise Unsupported(f"{what} would take {entries * 8 / 1e9:.0f} GB")


def _primal(task: Task) -> bool:
    return task.n_params <= task.n_rows


# --- plain torch.func ---------------------------------------------------------------------------


def torch_pass(task: Task) -> Outcome:
    """One forward and backward pass over the data, the least that a product can cost."""
    _matrix_free_alone(task)
    for x, y in _batches(task, 500):
        task.model.zero_grad()
        nn.functional.cross_entropy(task.model(x), y).backward()
    return Outcome(None)


def torch_func(task: Task) -> Outcome:
    """vmap(jacrev) of S_i'f(x_i), all rows of B at once."""
    _dense_fits(task, task.n_rows * task.n_params, "the Jacobian of all samples")
    started = time.perf_counter()
    factor = Categorical().factor(task.logits, task.y)
    params = {name: p.detach() for name, p in task.model.named_parameters()}

    def whitened(p: dict[str, Tensor], x: Tensor, root: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(task.model, p, (x[None],))[0]
        return root.T @ out

    jacobian = torch.func.vmap(torch.func.jacrev(whitened), in_dims=(None, 0, 0))
    with torch.no_grad():
        parts = jacobian(params, task.x, factor.root)
    rows = torch.cat([part.flatten(0, 1).flatten(1) for part in parts.values()], dim=1)
    del parts
    rows /= task.n**0.5
    first = time.perf_counter()
    if _primal(task):
        outcome = _outcome(task, finish_primal(task, rows.T @ rows, rows, N_CLASSES - 1), factor)
    else:
        outcome = _outcome(task, finish_dual(task, rows @ rows.T, N_CLASSES - 1), factor)
    return _staged(outcome, started, first, "Jacobian")


def _staged(outcome: Outcome, started: float, first: float, what: str) -> Outcome:
    outcome.stages = {what: first - started, "dense algebra": time.perf_counter() - first}
    return outcome


# --- BackPACK -----------------------------------------------------------------------------------


def _backpack_model(task: Task) -> nn.Module:
    from backpack import extend

    if not isinstance(task.model, nn.Sequential):
        raise Unsupported(
            "its second-order extensions need a sequence of known layers (for a branching network,"
            " one rebuilt from BackPACK's own modules; attention and layer norm are not among them)"
        )
    return extend(task.model)


def backpack_sqrt(task: Task) -> Outcome:
    """SqrtGGNExact: V with G = V V', K columns per sample; V'V layer by layer."""
    from backpack import backpack, extend
    from backpack.extensions import SqrtGGNExact

    _dense_fits(task, task.n * N_CLASSES * task.n_params, "the square root of G")
    started = time.perf_counter()
    model = _backpack_model(task)
    loss = extend(nn.CrossEntropyLoss())
    with backpack(SqrtGGNExact()):
        loss(model(task.x), task.y).backward()
    parts = []
    for p in model.parameters():
        parts.append(p.sqrt_ggn_exact.transpose(0, 1).reshape(task.n * N_CLASSES, -1))
        del p.sqrt_ggn_exact
    first = time.perf_counter()
    # BackPACK's root is diag(sqrt p) - p sqrt(p)': the residual is the root times v.
    p = torch.softmax(task.logits, dim=1)
    v = torch.zeros_like(p).scatter(1, task.y[:, None], -p.gather(1, task.y[:, None]).rsqrt())
    root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
    factor = Factor(root, v)
    if _primal(task):
        rows = torch.cat(parts, dim=1)
        outcome = _columns_of_k(task, finish_primal(task, rows.T @ rows, rows, N_CLASSES), factor)
    else:
        gram = torch.zeros(task.n * N_CLASSES, task.n * N_CLASSES, dtype=torch.float64)
        while parts:
            part = parts.pop()
            gram.addmm_(part, part.T)
        outcome = _columns_of_k(task, finish_dual(task, gram, N_CLASSES), factor)
    return _staged(outcome, started, first, "square root of G")


def _columns_of_k(task: Task, found: tuple[Tensor, Tensor], factor: Factor) -> Outcome:
    """The estimates where S has K columns: the logits' shift is b over the root of p."""
    q, complement = found
    v = factor.residual
    b = torch.linalg.solve(complement, v[:, :, None])[:, :, 0] - v
    shifted = task.logits + b / torch.softmax(task.logits, dim=1).sqrt()
    nll = nn.functional.cross_entropy
    psi = nll(shifted, task.y, reduction="none") - nll(task.logits, task.y, reduction="none")
    return Outcome(
        float(q.diagonal(dim1=1, dim2=2).sum()),
        float(torch.einsum("ni,nij,nj->n", v, q, v).mean()),
        float(psi.mean()),
    )


def backpack_diagonal(task: Task) -> Outcome:
    """DiagGGNExact and SumGradSquared: everything off the diagonal dropped."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact, SumGradSquared

    started = time.perf_counter()
    model = _backpack_model(task)
    loss = extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact(), SumGradSquared()):
        loss(model(task.x), task.y).backward()
    rank = energy = 0.0
    for p in model.parameters():
        inverse = 1.0 / (p.diag_ggn_exact + PENALTY)
        rank += float((p.diag_ggn_exact * inverse).sum())
        # Gradients of the mean loss: each sample's is g_i/n, and diag(C) = n times their squares.
        energy += float((task.n * p.sum_grad_squared * inverse).sum())
    return Outcome(rank, energy / task.n, stages={"all": time.perf_counter() - started})


# --- nngeometry ---------------------------------------------------------------------------------


def _nngeometry_loader(task: Task, root: Tensor, batch: int) -> torch.utils.data.DataLoader:
    data = torch.utils.data.TensorDataset(task.x, root)
    return torch.utils.data.DataLoader(data, batch_size=batch)


def _nngeometry_function(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, root: torch.einsum("nkj,nk->nj", root, task.model(x))


def _nngeometry_layers(task: Task) -> None:
    from nngeometry.layercollection import LayerCollection

    if any(isinstance(m, nn.BatchNorm2d) for m in task.model.modules()):
        raise Unsupported("its Jacobian hooks differentiate batch norm in training mode only")
    try:
        LayerCollection.from_model(task.model)
    except Exception as error:
        raise Unsupported(f"it knows no representation of a layer: {error}") from error


def nngeometry_exact(task: Task) -> Outcome:
    """FMatDense, the Gram matrix through activations and deltas; PMatDense where P < N."""
    from nngeometry import GramMatrix
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.object import FMatDense, PFMapDense

    _nngeometry_layers(task)
    started = time.perf_counter()
    factor = Categorical().factor(task.logits, task.y)
    function = _nngeometry_function(task)
    loader = _nngeometry_loader(task, factor.root, task.n)
    if _primal(task):
        backend = TorchHooksJacobianBackend(model=task.model, function=function)
        rows = PFMapDense(generator=backend, examples=loader).to_torch()
        rows = rows.transpose(0, 1).flatten(0, 1) / task.n**0.5
        first = time.perf_counter()
        outcome = _outcome(task, finish_primal(task, rows.T @ rows, rows, N_CLASSES - 1), factor)
        return _staged(outcome, started, first, "Jacobian")
    try:
        gram = GramMatrix(
            task.model, loader, function=function, representation=FMatDense
        ).to_torch()
    except RuntimeError as error:
        if "t() expects a tensor with <= 2 dimensions" not in str(error):
            raise
        raise Unsupported(
            "its Gram matrix takes linear layers of one row per sample, not of a sequence"
        ) from error
    gram = gram.permute(1, 0, 3, 2).reshape(task.n_rows, task.n_rows) / task.n
    first = time.perf_counter()
    outcome = _outcome(task, finish_dual(task, gram, N_CLASSES - 1), factor)
    return _staged(outcome, started, first, "Gram matrix")


def nngeometry_kfac(task: Task) -> Outcome:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatKFAC

    _nngeometry_layers(task)
    if any(isinstance(m, nn.LayerNorm) for m in task.model.modules()):
        raise Unsupported("its PMatKFAC has no representation of layer norm")
    started = time.perf_counter()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(task.x), batch_size=min(task.n, 500)
    )
    fisher = FIM(task.model, loader, PMatKFAC, variant="classif_logits")
    fisher.compute_eigendecomposition()
    rank = 0.0
    for a, g in fisher.get_eigendecomposition()[0].values():
        values = torch.outer(a, g).clamp_min(0.0)
        rank += float((values / (values + PENALTY)).sum())
    return Outcome(rank, stages={"all": time.perf_counter() - started})


# --- curvlinops ---------------------------------------------------------------------------------


def _batches(task: Task, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(task.x.split(size), task.y.split(size), strict=True))


def curvlinops_cg(task: Task) -> Outcome:
    """(G + lambda I)^-1 by CGInverseLinearOperator, all right-hand sides at once.

    Soft rank: Hutchinson's z'G (G + lambda I)^-1 z. TIC: with w = sum_i e_i g_i/sqrt(n), e_i = +-1,
    from TransposedJacobianLinearOperator, w'(G + lambda I)^-1 w is unbiased for
    tr(C (G + lambda I)^-1), and far less noisy than probing C (G + lambda I)^-1 from outside.
    """
    from curvlinops import (
        CGInverseLinearOperator,
        GGNLinearOperator,
        TransposedJacobianLinearOperator,
    )
    from curvlinops.examples import IdentityLinearOperator

    started = time.perf_counter()
    torch.manual_seed(0)
    params = list(task.model.parameters())
    data = _batches(task, 1000)
    shared = {"check_deterministic": False, "num_data": task.n}
    ggn = GGNLinearOperator(task.model, nn.CrossEntropyLoss(), params, data, **shared)
    damping = IdentityLinearOperator([p.shape for p in params], task.x.device, task.x.dtype)
    inverse = CGInverseLinearOperator(
        ggn + PENALTY * damping, tolerance=CG_TOLERANCE, eps=0.0, max_iter=1000, max_tridiag_iter=0
    )
    pull = TransposedJacobianLinearOperator(task.model, params, data, **shared)
    z = torch.randint(0, 2, (task.n_params, PROBES)).double() * 2 - 1
    signs = torch.randint(0, 2, (task.n, 1, PROBES)).double() * 2 - 1
    r = Categorical().residual(task.logits, task.y)
    w = pull @ (r[:, :, None] * signs).flatten(0, 1) / task.n**0.5
    solved = inverse @ torch.cat([z, w], dim=1)
    ranks = (z * (ggn @ solved[:, :PROBES])).sum(dim=0)
    energies = (w * solved[:, PROBES:]).sum(dim=0) / task.n
    root = PROBES**0.5
    return Outcome(
        float(ranks.mean()),
        float(energies.mean()),
        soft_rank_se=float(ranks.std()) / root,
        tic_se=float(energies.std()) / root,
        stages={"all": time.perf_counter() - started},
    )


def curvlinops_product(task: Task) -> Outcome:
    """G v in parameter space for a block of vectors: u'G u ~ tr(G)."""
    from curvlinops import GGNLinearOperator

    _matrix_free_alone(task)
    params = list(task.model.parameters())
    ggn = GGNLinearOperator(
        task.model, nn.CrossEntropyLoss(), params, _batches(task, 1000),
        check_deterministic=False, num_data=task.n,
    )  # fmt: skip
    u = _signs(task.n_params)
    return _traces((u * (ggn @ u)).sum(dim=0))


def _curvlinops_kfac(task: Task, corrected: bool) -> Outcome:
    from curvlinops import EKFACLinearOperator, FisherType, KFACLinearOperator

    started = time.perf_counter()
    operator = EKFACLinearOperator if corrected else KFACLinearOperator
    params = list(task.model.parameters())
    try:
        kfac = operator(
            task.model, nn.CrossEntropyLoss(), params, _batches(task, 500),
            fisher_type=FisherType.TYPE2, check_deterministic=False, num_data=task.n,
            num_per_example_loss_terms=1,
        )  # fmt: skip
    except NotImplementedError as error:
        raise Unsupported("it covers Linear and Conv2d layers alone") from error
    kfac.compute_kronecker_factors()
    rank = 0.0
    if corrected:
        kfac.compute_eigenvalue_correction()
        for by_parameter in kfac.state_dict()["corrected_eigenvalues"].values():
            for values in by_parameter.values():
                rank += float((values / (values + PENALTY)).sum())
        return Outcome(rank, stages={"all": time.perf_counter() - started})
    state = kfac.state_dict()
    for name, g in state["gradient_covariances"].items():
        outer = torch.linalg.eigvalsh(g)
        inner = state["input_covariances"].get(name)
        layer = task.model.get_submodule(name)
        blocks = [torch.outer(outer, torch.linalg.eigvalsh(inner))] if inner is not None else []
        blocks += [outer] if layer.bias is not None else []
        rank += sum(float((b.clamp_min(0) / (b.clamp_min(0) + PENALTY)).sum()) for b in blocks)
    return Outcome(rank, stages={"all": time.perf_counter() - started})


# --- laplace-torch ------------------------------------------------------------------------------


def laplace(task: Task, structure: str) -> Outcome:
    """Laplace(...).fit, then functional_variance on the training data's Jacobians: n A_i."""
    from laplace import Laplace
    from laplace.curvature import CurvlinopsGGN

    if structure == "full" and task.n_params > 30_000:
        gigabytes = 8 * task.n_params**2 / 1e9
        raise Unsupported(
            f"its dense posterior is P x P, {gigabytes:.0f} GB a matrix; the 'gp' structure in"
            " output space treats the classes as independent, so is not this quantity"
        )
    norms = nn.LayerNorm | nn.BatchNorm2d
    if structure == "kron" and any(isinstance(m, norms) for m in task.model.modules()):
        raise Unsupported("its Kronecker factors cover Linear and Conv2d layers alone")
    started = time.perf_counter()
    backend = {"backend": CurvlinopsGGN} if structure != "full" else {}
    fitted = Laplace(
        task.model, "classification", subset_of_weights="all", hessian_structure=structure,
        prior_precision=task.n * PENALTY, **backend,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(task.x, task.y)
    fitted.fit(torch.utils.data.DataLoader(data, batch_size=500))
    first = time.perf_counter()
    p = torch.softmax(task.logits, dim=1)
    variance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    r = Categorical().residual(task.logits, task.y)
    at = max(1, int(2**28 / (8 * N_CLASSES * task.n_params)))
    parts = []
    for x in task.x.split(at):
        parts.append(fitted.functional_variance(fitted.backend.jacobians(x)[0]).detach())
    a = torch.cat(parts)
    shift = a @ torch.linalg.solve(
        torch.eye(N_CLASSES, dtype=a.dtype) - variance @ a, r[:, :, None]
    )
    shifted = task.logits + shift[:, :, 0]
    nll = nn.functional.cross_entropy
    psi = nll(shifted, task.y, reduction="none") - nll(task.logits, task.y, reduction="none")
    outcome = Outcome(
        float(torch.einsum("nij,nji->", variance, a)),
        float(torch.einsum("ni,nij,nj->n", r, a, r).mean()),
        float(psi.mean()) if bool(torch.isfinite(psi).all()) else None,
    )
    return _staged(outcome, started, first, "fit")


_ROWS: tuple[tuple[str, str, str, str, Callable[[Task], Outcome]], ...] = (
    ("flataudit", "flataudit", "flataudit", "exact", ours_exact),
    ("flataudit-other", "flataudit", "flataudit, other solver", "exact", ours_other),
    ("flataudit-lanczos", "flataudit", "flataudit lanczos", "estimate", ours_lanczos),
    ("flataudit-sampling", "flataudit", "flataudit sampling", "estimate", ours_sampling),
    ("torch-func", "torch", "torch.func vmap(jacrev)", "exact", torch_func),
    ("backpack-sqrt", "backpack-for-pytorch", "BackPACK SqrtGGNExact", "exact", backpack_sqrt),
    ("nngeometry-dense", "nngeometry", "nngeometry dense", "exact", nngeometry_exact),
    ("laplace-full", "laplace-torch", "laplace-torch full", "exact", lambda t: laplace(t, "full")),
    (
        "curvlinops-cg", "curvlinops-for-pytorch", f"curvlinops CG, {PROBES} probes", "estimate",
        curvlinops_cg,
    ),
    ("torch-pass", "torch", "forward and backward pass", "product", torch_pass),
    ("flataudit-product", "flataudit", f"flataudit, {VECTORS} products", "product", ours_product),
    (
        "curvlinops-product", "curvlinops-for-pytorch", f"curvlinops GGN, {VECTORS} products",
        "product", curvlinops_product,
    ),
    ("flataudit-kfac", "flataudit", "flataudit kfac", "approximation", ours_kfac),
    (
        "curvlinops-kfac", "curvlinops-for-pytorch", "curvlinops KFAC", "approximation",
        lambda t: _curvlinops_kfac(t, False),
    ),
    (
        "curvlinops-ekfac", "curvlinops-for-pytorch", "curvlinops EKFAC", "approximation",
        lambda t: _curvlinops_kfac(t, True),
    ),
    ("nngeometry-kfac", "nngeometry", "nngeometry KFAC", "approximation", nngeometry_kfac),
    (
        "laplace-kron", "laplace-torch", "laplace-torch KFAC", "approximation",
        lambda t: laplace(t, "kron"),
    ),
    (
        "backpack-diagonal", "backpack-for-pytorch", "BackPACK diagonal", "approximation",
        backpack_diagonal,
    ),
)  # fmt: skip
METHODS: dict[str, Method] = {row[0]: Method(*row) for row in _ROWS}
