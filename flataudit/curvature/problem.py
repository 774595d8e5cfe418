"""A fitted model and its data as one least-squares-like problem: B = S'J / sqrt(n).

Row block i of B is S_i' J_i / sqrt(n), (K', P), so that G = B'B is the generalized Gauss-Newton
matrix of the MEAN loss: n and the reduction are fixed here, once, and nowhere else.
J_i = df_i/dtheta (K, P); Lambda_i = S_i S_i' (see `flataudit.families`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flataudit.errors import InputError, MemoryPlanError
from flataudit.families import Factor, Family
from flataudit.inputs import Inputs
from flataudit.memory import available_bytes, human

# Working set of one chunk of samples: large enough for full-speed products, small enough that the
# allocator reuses its pages (a fresh mapping for every chunk costs more than the arithmetic).
CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Everything a solver may ask of the model. Build it with `make_problem`.

    outputs f (n, K) float64; factor: S (n, K, K') and v (n, K'); params: the trained tensors
    (requires_grad) by name; `repeat` is the smallest batch the model accepts.
    """

    model: nn.Module
    params: Mapping[str, Tensor]
    x: Inputs
    y: Tensor
    family: Family
    outputs: Tensor
    factor: Factor
    chunk_size: int | None = None
    repeat: int = 1

    @property
    def n_samples(self) -> int:
        return len(self.outputs)

    @property
    def n_outputs(self) -> int:
        return self.outputs.shape[1]

    @property
    def n_columns(self) -> int:
        """K', the columns of S: K - 1 for the categorical family, else K."""
        return self.factor.residual.shape[1]

    @property
    def n_rows(self) -> int:
        """N = n K', the rows of B."""
        return self.n_samples * self.n_columns

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.params.values())

    @property
    def device(self) -> torch.device:
        return self.outputs.device

    def with_factor(self, factor: Factor) -> Problem:
        """The same model and data with another square root of the variance."""
        return dataclasses.replace(self, factor=factor)

    def with_family(self, family: Family) -> Problem:
        """The same model and data under another family (a new dispersion)."""
        return dataclasses.replace(self, family=family, factor=family.factor(self.outputs, self.y))

    def subset(self, index: Sequence[int]) -> Problem:
        """The samples at `index` alone, with B still divided by the square root of their number."""
        at = torch.as_tensor(index, device=self.device)
        factor = Factor(self.factor.root[at], self.factor.residual[at])
        return dataclasses.replace(
            self, x=self.x[at], y=self.y[at], outputs=self.outputs[at], factor=factor
        )

    def few(self) -> Problem:
        """The first, the middle and the last sample, on which a faster route is tried."""
        n = self.n_samples
        return self.subset(sorted({0, n // 2, n - 1}))

    def chunks(self, values_per_sample: int) -> Iterator[slice]:
        """Slices of samples whose working set of float64 values stays near CHUNK_BYTES."""
        size = self.chunk_size or max(1, CHUNK_BYTES // (8 * max(1, values_per_sample)))
        for start in range(0, self.n_samples, size):
            yield slice(start, min(start + size, self.n_samples))

    def rows(self, at: slice, names: Sequence[str] | None = None) -> Tensor:
        """Rows of B for the samples `at`, columns of the parameters `names` (all by default).

        The Jacobian route: vector-Jacobian products with the columns of S, vmapped over samples;
        sample by sample for a model that vmap cannot trace. Returns (c, K', P_names) float64.
        """
        chosen = {name: self.params[name] for name in (names or self.params)}
        scale = self.n_samples**-0.5
        # The root's own row stride matters to vmap: contiguous (c, K', K) cotangents.
        cotangents = (self.factor.root[at] * scale).mT.contiguous()
        return _vjp_rows(self, chosen, self.x[at], cotangents)

    def gradient_moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Mean and uncentred second moment of the per-sample NLL gradients g_i = J_i' r_i.

        Returns two dicts of tensors with the parameters' shapes: (1/n) sum g_i and
        (1/n) sum g_i^2 = diag(C), C the uncentred gradient covariance.
        """
        mean = {k: torch.zeros_like(p, dtype=torch.float64) for k, p in self.params.items()}
        second = {k: torch.zeros_like(p, dtype=torch.float64) for k, p in self.params.items()}
        residual = self.family.residual(self.outputs, self.y)
        for at in self.chunks(3 * self.n_params):
            pulled = _vjp_tensors(self, self.params, self.x[at], residual[at][:, None, :])
            for name, g in pulled.items():
                g = g[:, 0].to(torch.float64)
                mean[name] += g.sum(dim=0)
                second[name] += g.square().sum(dim=0)
        n = self.n_samples
        return {k: t / n for k, t in mean.items()}, {k: t / n for k, t in second.items()}

    def is_linear(self, seed: int = 0) -> bool:
        """Whether f is affine in the parameters: f at a midpoint is the mean of f at the ends."""
        generator = torch.Generator().manual_seed(seed)
        x = self.x[: min(8, self.n_samples)]
        other = {
            k: p.detach()
            + (1.0 + p.detach().abs().mean())
            * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            for k, p in self.params.items()
        }
        middle = {k: (p.detach() + other[k]) / 2 for k, p in self.params.items()}
        with torch.no_grad():
            ends = evaluate(self.model, x) + evaluate(self.model, x, other)
            halfway = 2 * evaluate(self.model, x, middle)
        if self.family.name == "categorical":  # softmax ignores a constant, log p differs by one
            ends, halfway = (f - f.mean(dim=1, keepdim=True) for f in (ends, halfway))
        tolerance = 1e-9 if next(iter(self.params.values())).dtype == torch.float64 else 1e-4
        return bool(torch.allclose(ends, halfway, rtol=tolerance, atol=tolerance))


def make_problem(
    model: nn.Module,
    x: Inputs | Tensor,
    y: Tensor,
    family: Family,
    *,
    chunk_size: int | None = None,
) -> Problem:
    """The problem at the model's current parameters; `model` is a prepared copy in eval mode.

    Raises:
        InputError: no trained parameters, outputs that are not finite, or outputs of one sample
            that depend on the other samples of its batch.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise InputError(
            "expected a model with trained parameters, got none with requires_grad=True;"
            " flatness is undefined without parameters"
        )
    x = Inputs.of(x)
    outputs = predict(model, x, chunk_size=chunk_size)
    _plan_factor(outputs)
    if not bool(torch.isfinite(outputs).all()):
        bad = int((~torch.isfinite(outputs)).any(dim=1).sum())
        raise InputError(
            f"expected finite model outputs, got NaN or infinity for {bad} of {len(outputs)}"
            " samples; check the weights and the preprocessing of x"
        )
    repeat = _smallest_batch(model, x, outputs)
    factor = family.factor(outputs, y)
    return Problem(model, params, x, y, family, outputs, factor, chunk_size, repeat)


def _plan_factor(outputs: Tensor) -> None:
    """MemoryPlanError where the square roots S_i alone, (n, K, K) and copies, would not fit."""
    n, n_outputs = outputs.shape
    needed, available = 4 * 8 * n * n_outputs**2, available_bytes(outputs.device)
    if needed > available:
        raise MemoryPlanError(
            f"expected the variances of {n} samples with {n_outputs} outputs to fit into"
            f" {human(available)}, got a plan of {human(needed)}; audit a random subset of the"
            " training data, or use more memory"
        )


def evaluate(model: nn.Module, x: Inputs, params: Mapping[str, Tensor] | None = None) -> Tensor:
    """Model outputs as (n, K) float64, at other parameters where given."""
    out = x.call(model, params)
    if not isinstance(out, Tensor):
        raise InputError(
            f"expected one output tensor, or an object with logits, got {type(out).__name__}; wrap"
            " the model so that it returns its logits alone"
        )
    if out.ndim == 0 or len(out) != len(x):
        raise InputError(
            f"expected one output row per sample, got shape {tuple(out.shape)} for"
            f" {len(x)} samples; wrap the model so that samples come first"
        )
    return out.reshape(len(out), -1).to(torch.float64)


def predict(model: nn.Module, x: Inputs | Tensor, *, chunk_size: int | None = None) -> Tensor:
    """Outputs (n, K) float64 in eval mode without gradients, chunk by chunk."""
    x = Inputs.of(x)
    size = max(2, chunk_size or 1024)
    starts = list(range(0, len(x), size))
    # A model exported with a batch of at least two must not meet a last chunk of one sample.
    if len(starts) > 1 and len(x) - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], len(x)]
    with torch.no_grad():
        return torch.cat([evaluate(model, x[a:b]) for a, b in zip(starts, ends, strict=True)])


def _smallest_batch(model: nn.Module, x: Inputs, outputs: Tensor) -> int:
    """1, or 2 for an exported graph that refuses a batch of one.

    Raises InputError for outputs that are random or depend on the other samples of the batch.
    """
    repeat = 1
    tolerance = 1e-4 * (float(outputs.abs().max()) + 1.0)
    with torch.no_grad():
        once, again = evaluate(model, x[:64]), evaluate(model, x[:64])
    if float((once - again).abs().max()) > tolerance:
        raise InputError(
            "expected the same outputs at every call, got random ones; pass self.training to"
            " functional dropout, so that eval mode switches it off"
        )
    try:
        with torch.no_grad():
            alone = evaluate(model, x[:1])
    except Exception:  # an exported graph's guard may raise anything; squeeze() drops the batch
        repeat = 2
        with torch.no_grad():
            alone = evaluate(model, x[[0, 0]])[:1]
    if float((alone[0] - outputs[0]).abs().max()) > tolerance:
        raise InputError(
            "expected outputs that depend on their own sample alone, got outputs that change with"
            " the batch; put batch statistics and attention across samples in eval mode"
        )
    return repeat


def _vjp_rows(
    problem: Problem, chosen: Mapping[str, Tensor], x: Inputs, cotangents: Tensor
) -> Tensor:
    """cotangents (c, m, K) times each sample's Jacobian: (c, m, P_chosen) float64."""
    pulled = _vjp_tensors(problem, chosen, x, cotangents)
    flat = [pulled[name].reshape(*cotangents.shape[:2], -1) for name in chosen]
    return torch.cat(flat, dim=2).to(torch.float64)


def _vjp_tensors(
    problem: Problem, chosen: Mapping[str, Tensor], x: Inputs, cotangents: Tensor
) -> dict[str, Tensor]:
    """The same by parameter, each (c, m, *shape) in the parameters' own dtype."""
    # Parameters that are not asked for must not require gradients either: batch norm's vmap rule
    # would otherwise leave functorch.
    fixed = {name: p.detach() for name, p in problem.params.items()}
    leaves = {name: fixed[name] for name in chosen}
    dtype = next(iter(leaves.values())).dtype

    def outputs_of(sample: tuple[Tensor, ...]) -> Callable[[dict[str, Tensor]], Tensor]:
        batch = x.like(tuple(t.expand(problem.repeat, *t.shape) for t in sample))

        def f(p: dict[str, Tensor]) -> Tensor:
            out: Tensor = batch.call(problem.model, fixed | p)
            return out[0].reshape(-1)

        return f

    def one(sample: tuple[Tensor, ...], rows: Tensor) -> dict[str, Tensor]:
        pull = torch.func.vjp(outputs_of(sample), leaves)[1]
        grads: tuple[dict[str, Tensor]] = torch.func.vmap(pull)(rows)
        return grads[0]

    cotangents = cotangents.to(dtype)
    try:
        # The other attention kernels have no batching rule; where an operator has none, torch
        # loops over it, right but slow, and warns.
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            pulled: dict[str, Tensor] = torch.func.vmap(one)(x.parts, cotangents)
        return pulled
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # Data-dependent control flow, recurrent kernels and the like raise almost anything: one
        # sample at a time, where an error of the model's own is raised again.
        each = [
            _sample_tensors(problem, chosen, x[i : i + 1], cotangents[i]) for i in range(len(x))
        ]
        return {name: torch.stack([tensors[name] for tensors in each]) for name in chosen}


def _sample_tensors(
    problem: Problem, chosen: Mapping[str, Tensor], x: Inputs, cotangents: Tensor
) -> dict[str, Tensor]:
    """One sample's (m, *shape) by plain reverse mode."""
    with torch.enable_grad():
        out = x[[0] * problem.repeat].call(problem.model)[0].reshape(-1)
    rows = [
        torch.autograd.grad(
            out, list(chosen.values()), cotangent, retain_graph=True, materialize_grads=True
        )
        for cotangent in cotangents
    ]
    return {
        name: torch.stack(parts)
        for name, parts in zip(chosen, zip(*rows, strict=True), strict=True)
    }
