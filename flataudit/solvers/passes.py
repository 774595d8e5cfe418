"""Passes over the data with several vectors at once: B_p'v and B_p u for chosen parameters p.

No Jacobian is formed: vector-Jacobian and Jacobian-vector products go through the network chunk by
chunk of samples. Memory is a few copies of the parameters per vector plus one chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flataudit.curvature.problem import Problem, evaluate
from flataudit.errors import NumericalError
from flataudit.inputs import Inputs

# Vectors that go through the network together, and the activations of one chunk with all of them.
# More of either is slower: arrays beyond some 30 MB are handed back to the system and fetched anew
# at every use, which took half of the time of a convolutional network with 80 vectors at once.
# Fewer share too little, and smaller chunks add up the parameters' gradients too often.
VECTORS = 16
WORKING_BYTES = 16 * 2**20
# A graphics card's allocator keeps what was freed, and an operation has to be large to be worth its
# start: 16 MB are read in some 5 microseconds, as long as a start takes. Reckoned, not measured.
DEVICE_BYTES = 512 * 2**20

Tensors = dict[str, Tensor]


class Passes:
    """Products of B's columns of the parameters `names` with blocks of vectors, float64.

    dtype: of the network's arithmetic; vectors and sums stay float64.

    reason: why the slower route is used (one vector at a time, by differentiating twice), or None.

    Raises:
        NumericalError: the network's derivatives in two modes disagree.
    """

    def __init__(
        self, problem: Problem, names: Sequence[str], *, dtype: torch.dtype | None = None
    ) -> None:
        self.problem, self.names = problem, list(names)
        own = next(iter(problem.params.values())).dtype
        self.dtype = dtype or own
        cast = self.dtype if self.dtype != own else None
        self._x = problem.x if cast is None else problem.x.to(self.dtype)
        fixed = {name: p.detach() for name, p in problem.params.items()}
        if cast is not None:  # buffers as well: a float64 running mean would promote everything
            everything = {**dict(problem.model.named_parameters()),
                          **dict(problem.model.named_buffers())}  # fmt: skip
            fixed = {k: _cast(t.detach(), self.dtype) for k, t in everything.items()}
        self._fixed = fixed
        self.size = sum(problem.params[name].numel() for name in self.names)
        self._per_sample = activations_per_sample(problem)
        self.reason: str | None = None
        self._choose_route()

    def pull(self, v: Tensor) -> Tensors:
        """B_p'v for v (N, m): by parameter (m, *shape), float64; VJPs summed over chunks."""
        pulled = [self._pull_all(v[:, group], self._pull) for group in groups(v.shape[1])]
        if len(pulled) == 1:
            return pulled[0]
        # One parameter after the other, so that no more than one is there twice.
        return {name: torch.cat([part.pop(name) for part in pulled]) for name in list(pulled[0])}

    def _pull_all(self, v: Tensor, route: Callable[[Inputs, Tensor], Tensors]) -> Tensors:
        total: Tensors = {}
        for at in self._chunks(v.shape[1]):
            for name, g in route(self._x[at], self._cotangents(v, at)).items():
                g = g.to(torch.float64)
                if name in total:
                    total[name] += g
                else:
                    total[name] = g.contiguous()  # zeros of an unused parameter may be expanded
        return total

    def push(self, u: Mapping[str, Tensor]) -> Tensor:
        """B_p u for u (m, *shape) by parameter: (N, m) float64; JVPs chunk by chunk."""
        m, k = len(next(iter(u.values()))), self.problem.n_columns
        out = torch.zeros(self.problem.n_rows, m, dtype=torch.float64, device=self.problem.device)
        for group in groups(m):
            tangents = {name: u[name][group].to(self._fixed[name].dtype) for name in self.names}
            for at in self._chunks(group.stop - group.start):
                rows = slice(at.start * k, at.stop * k)
                out[rows, group] = self._push(at, tangents).flatten(0, 1)
        return out

    # --- routes -------------------------------------------------------------------------------

    def _choose_route(self) -> None:
        """The first route that agrees with plain reverse mode.

        Batched (all vectors at once); differentiating twice, one vector at a time; the Jacobian's
        rows. Raises NumericalError where none does.
        """
        self._pull, self._push = self._pull_batched, self._push_batched
        if not self.names:
            return
        failure = self._failure()
        if failure is None:
            return
        self._pull = self._pull_plain
        routes = {
            "one vector at a time": self._push_twice,
            "with the Jacobian's rows": self._push_rows,
        }
        for how, route in routes.items():
            self._push = route
            second = self._failure()
            if second is None:
                self.reason = f"{how}, since the batched derivatives fail: {failure}"
                return
        raise NumericalError(
            "expected the network's derivatives in forward and reverse mode to agree, got"
            f" {second}; likely cause: weights or inputs near overflow; use solver=primal or dual"
        )

    def _failure(self) -> str | None:
        """What is wrong with the current route, or None.

        On all samples, for the price of two products: torch 2.13's forward mode is wrong for
        transformer layers where positions are padded, which a few samples need not show.
        """
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            normal = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return normal.to(self.problem.device)

        # Two vectors: a single one takes a way of its own.
        v = drawn(self.problem.n_rows, 2)
        u = {name: drawn(2, *self.problem.params[name].shape) for name in self.names}
        try:
            pulled, pushed = self._pull_all(v, self._pull), self.push(u)
            alone = self.push({name: t[:1] for name, t in u.items()})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an operation without a rule for it may raise anything
            return f"{type(error).__name__} ({' '.join(str(error).split())[:80]})"
        plain = self._pull_all(v, self._pull_plain)
        tolerance = 1e-8 if self.dtype == torch.float64 else 2e-3
        largest = {name: float(g.abs().max()) for name, g in plain.items()}
        # A softmax does not see the bias of its keys: that gradient is rounding error throughout.
        floor = 1e-2 * max(largest.values())
        for name, g in plain.items():
            allowed = tolerance * max(largest[name], floor)
            if not bool(((pulled[name] - g).abs() <= allowed).all()):
                return f"the two reverse modes differ in {name}"
        if not bool(((alone - pushed[:, :1]).abs() <= tolerance * pushed.abs().max()).all()):
            return "the forward mode of one vector differs from that of several"
        rows = pushed * v
        dots = torch.stack([(plain[name] * u[name]).sum() for name in self.names])
        size = rows.abs().sum() + dots.abs().sum()
        if not bool((rows.sum() - dots.sum()).abs() <= tolerance * size):
            return "the forward mode is not the transpose of the reverse mode"
        return None

    def _outputs(self, x: Inputs) -> Callable[[Tensors], Tensor]:
        def f(p: Tensors) -> Tensor:
            return evaluate(self.problem.model, x, self._fixed | p)

        return f

    def _pull_batched(self, x: Inputs, cotangents: Tensor) -> Tensors:
        if len(cotangents) == 1:  # no vmap, whose rules cost more than they share
            return self._pull_plain(x, cotangents)
        with _tracing():
            leaves = {name: self._fixed[name] for name in self.names}
            pull = torch.func.vjp(self._outputs(x), leaves)[1]
            pulled: tuple[Tensors] = torch.func.vmap(pull)(cotangents)
        return pulled[0]

    def _push_batched(self, at: slice, tangents: Tensors) -> Tensor:
        leaves = {name: self._fixed[name] for name in self.names}
        f = self._outputs(self._x[at])

        def one(t: Tensors) -> Tensor:
            moved: Tensor = torch.func.jvp(f, (leaves,), (t,))[1]
            return moved

        with _tracing():
            if len(next(iter(tangents.values()))) == 1:
                pushed = one({name: t[0] for name, t in tangents.items()})[None]
            else:
                pushed = torch.func.vmap(one)(tangents)
        return self._whitened(pushed, at)

    def _pull_plain(self, x: Inputs, cotangents: Tensor) -> Tensors:
        leaves = self._leaves()
        with _tracing(), torch.enable_grad():
            out = self._outputs(x)(leaves)
            rows = [
                torch.autograd.grad(
                    out, list(leaves.values()), c, retain_graph=True, materialize_grads=True
                )
                for c in cotangents
            ]
        return {name: torch.stack(parts) for name, parts in zip(leaves, zip(*rows, strict=True),
                                                                strict=True)}  # fmt: skip

    def _push_twice(self, at: slice, tangents: Tensors) -> Tensor:
        """J u as the derivative of w -> (J'w).u."""
        leaves = self._leaves()
        with _tracing(), torch.enable_grad():
            out = self._outputs(self._x[at])(leaves)
            w = torch.zeros_like(out, requires_grad=True)
            pulled = torch.autograd.grad(
                out, list(leaves.values()), w, create_graph=True, materialize_grads=True
            )
            rows = []
            for j in range(len(next(iter(tangents.values())))):
                dots = [
                    (g * tangents[name][j]).sum() for name, g in zip(leaves, pulled, strict=True)
                ]
                dot = torch.stack(dots).sum()
                rows.append(
                    torch.autograd.grad(
                        dot, w, retain_graph=True, materialize_grads=True, allow_unused=True
                    )[0]
                )
        return self._whitened(torch.stack(rows), at)

    def _push_rows(self, at: slice, tangents: Tensors) -> Tensor:
        """The rows of B_p themselves, a few samples at a time: K' backward passes each."""
        u = torch.cat([tangents[name].flatten(1) for name in self.names], dim=1).to(torch.float64).T
        budget = working_bytes(0, self.size, self.problem.device)
        step = max(1, budget // (8 * self.problem.n_columns * self.size))
        cuts = [slice(a, min(a + step, at.stop)) for a in range(at.start, at.stop, step)]
        return torch.cat([self.problem.rows(cut, self.names) @ u for cut in cuts])

    def _whitened(self, moved: Tensor, at: slice) -> Tensor:
        """S'J u/sqrt(n): (c, K', m) float64 from J u (m, c, K)."""
        root = self.problem.factor.root[at] * self.problem.n_samples**-0.5
        return torch.einsum("mck,ckj->cjm", moved.to(torch.float64), root)

    def _leaves(self) -> Tensors:
        return {name: self._fixed[name].detach().requires_grad_() for name in self.names}

    def _cotangents(self, v: Tensor, at: slice) -> Tensor:
        """S v/sqrt(n) for the samples `at`: (m, c, K)."""
        k = self.problem.n_columns
        rows = v[at.start * k : at.stop * k].view(at.stop - at.start, k, -1)
        root = self.problem.factor.root[at] * self.problem.n_samples**-0.5
        return torch.einsum("ckj,cjm->mck", root, rows).contiguous()

    def _chunks(self, m: int) -> Iterator[slice]:
        budget = working_bytes(m, self.size, self.problem.device)
        size = self.problem.chunk_size or max(1, budget // (8 * (m + 1) * self._per_sample))
        size, n = max(size, self.problem.repeat), self.problem.n_samples
        start = 0
        while start < n:
            stop = min(start + size, n)
            # An exported graph may refuse a last chunk of one sample.
            if n - stop < self.problem.repeat:
                stop = n
            yield slice(start, stop)
            start = stop


def groups(m: int) -> list[slice]:
    """m vectors, VECTORS at a time."""
    return [slice(first, min(first + VECTORS, m)) for first in range(0, m, VECTORS)]


def working_bytes(m: int, size: int, device: torch.device) -> int:
    """Bytes of the activations of one chunk, for m vectors of `size` parameters.

    At least twice what the vectors take: each chunk adds up their gradients.
    """
    return max(WORKING_BYTES if device.type == "cpu" else DEVICE_BYTES, 2 * 8 * m * size)


def activations_per_sample(problem: Problem) -> int:
    """Values that one sample's forward pass keeps for its backward pass, inputs included."""
    own = {p.data_ptr() for p in problem.params.values()}
    own |= {b.data_ptr() for b in problem.model.buffers()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = max(t.numel(), kept.get(t.data_ptr(), 0))
        return t

    few = problem.x[: min(2, problem.n_samples)]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = evaluate(problem.model, few)
    total = sum(kept.values()) // len(few) + few.values_per_sample + held.shape[1]
    return max(1, total)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() else t


@contextmanager
def _tracing() -> Iterator[None]:
    """With the attention kernel that has derivatives in every mode; without torch's notices."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        # torch's own, as it sets up forward mode for the first time.
        warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated")
        yield
