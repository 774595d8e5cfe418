"""How a killed solve goes on: its identity, and when its state is handed to the keeper."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flataudit.curvature.problem import Problem
from flataudit.solvers.base import Penalty, Work

State = dict[str, Tensor]
FORMAT = "5"  # of the saved states: another one never loads an older one


class Resume:
    """Hands states to `work.checkpoint`, also when the solve is interrupted.

    As a context it saves the last state offered on KeyboardInterrupt and passes that on. States
    are offered as functions, so that nothing is copied before it is written; they must not see
    later changes.
    """

    def __init__(self, problem: Problem, penalty: Penalty, work: Work, settings: Any) -> None:
        self._checkpoint = work.checkpoint
        self._latest: Callable[[], State] | None = None
        self._key = ""
        if self._checkpoint is not None:
            self._key = problem_key(problem, penalty, work.seed, settings)

    def load(self) -> State | None:
        """The state that an earlier run of the same solve left."""
        return None if self._checkpoint is None else self._checkpoint.load(self._key)

    def offer(self, state: Callable[[], State], *, last: bool = False) -> None:
        """A state from which the solve can go on; `last`: it is finished."""
        if self._checkpoint is not None:
            self._latest = state
            self._checkpoint.save(self._key, state, last=last)

    def __enter__(self) -> Resume:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if interrupted and self._checkpoint is not None and self._latest is not None:
            self._checkpoint.save(self._key, self._latest, last=True)


def problem_key(problem: Problem, penalty: Penalty, seed: int, settings: Any) -> str:
    """sha256 over weights, data, variance, penalty, seed and the solver's settings.

    settings: a dataclass whose repr holds every setting.
    """
    sha = hashlib.sha256(f"{FORMAT}|{seed}|{settings!r}|{problem.family.name}".encode())
    for name, p in problem.params.items():
        sha.update(name.encode())
        _add(sha, p)
        _add(sha, penalty[name])
    for name, b in problem.model.named_buffers():
        sha.update(name.encode())
        _add(sha, b)
    for _, part in problem.x.labelled():
        _add(sha, part)
    for t in (problem.y, problem.outputs, problem.factor.root, problem.factor.residual):
        _add(sha, t)
    return sha.hexdigest()


def _add(sha: Any, t: Tensor) -> None:
    array = t.detach().cpu().contiguous().numpy()
    sha.update(f"{array.dtype}{array.shape}".encode())
    sha.update(array.tobytes())
