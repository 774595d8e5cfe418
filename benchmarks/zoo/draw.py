"""The samples of one cell: the same for every cell of its group up to n and the label noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.zoo.data import Pool, Pools, Sources, pools, with_label_noise
from benchmarks.zoo.grid import Cell

N_HELDOUT = 200  # labels that an audit may be given: what a user has at hand
VALIDATION = 0.2  # of the n samples, where training stops early


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """train: what the weights were fitted to; validation: chooses the epoch of early stopping."""

    pools: Pools
    train: Pool
    validation: Pool | None
    heldout: Pool
    test: Pool


def draw(cell: Cell, sources: Sources | None = None) -> Drawn:
    """The cell's samples, reproducibly; with label noise in all of them alike.

    A cell with fewer samples has the first of those that its group's larger cells have.

    Raises:
        ValueError: the pool has fewer samples than the cell asks for, or a GLM misses a class.
    """
    found = pools(cell.data, sources)
    if cell.n > len(found.train):
        raise ValueError(f"expected n of at most {len(found.train)} for {cell.data}, got {cell.n}")
    rng = np.random.default_rng(cell.draw_seed)
    train = found.train.take(rng.permutation(len(found.train)))
    heldout = found.heldout.take(rng.permutation(len(found.heldout))[:N_HELDOUT])
    if cell.label_noise:
        train, heldout, test = (
            with_label_noise(part, cell.label_noise, found.n_outputs, cell.draw_seed + offset)
            for offset, part in enumerate((train, heldout, found.test), start=1)
        )
    else:
        test = found.test
    train, validation = train.take(slice(cell.n)), None
    if cell.early_stopping:
        cut = cell.n - round(VALIDATION * cell.n)
        train, validation = train.take(slice(cut)), train.take(slice(cut, None))
    if cell.architecture == "glm" and found.task == "classification":
        missing = found.n_outputs - len(np.unique(train.y))
        if missing:
            raise ValueError(
                f"expected all classes among n = {cell.n}, got {missing} of them missing"
            )
    return Drawn(found, train, validation, heldout, test)
