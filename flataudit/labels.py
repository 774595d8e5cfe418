"""Class labels given as text, mapped to the model's outputs 0..K-1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flataudit.errors import InputError, first_of

if TYPE_CHECKING:
    from torch import Tensor


class ClassNames(tuple[str, ...]):
    """The names of outputs 0..K-1, from the model or by `found_in` the labels themselves."""

    __slots__ = ()

    @classmethod
    def found_in(cls, labels: NDArray[np.str_]) -> ClassNames:
        """The sorted unique labels: the order of scikit-learn's encoders and ImageFolder."""
        return cls(str(name) for name in np.unique(labels))

    def indices(self, labels: NDArray[np.str_], name: str) -> NDArray[np.int64]:
        """Each label's output; InputError on one that is none of the classes."""
        known = np.array(self)
        order = np.argsort(known)
        place = np.searchsorted(known, labels, sorter=order).clip(max=len(known) - 1)
        found: NDArray[np.int64] = order[place]
        unknown = labels[known[found] != labels]
        if len(unknown):
            raise InputError(
                f"expected labels among {few(self)} in {name}, got {few(np.unique(unknown))} in"
                f" {len(unknown)} of {len(labels)} samples; drop them, or name the model's classes"
            )
        return found

    def sorted_indices(self, y: Tensor) -> Tensor:
        """Outputs y as indices into the sorted labels that occur: the same whatever the order."""
        import torch  # not above: who only writes an audit to MLflow does without

        _, found = np.unique(np.array(self)[y.numpy()], return_inverse=True)
        return torch.from_numpy(found.astype(np.int64))

    def check(self, n_outputs: int, family: str) -> None:
        """InputError unless each output has a class (one logit has two) and a class is meant."""
        if family not in ("categorical", "bernoulli"):
            raise InputError(
                f"expected numbers as targets for family={family}, got text ({few(self)}); leave"
                " out the family for class labels"
            )
        if len(self) != max(n_outputs, 2):
            raise InputError(
                f"expected {max(n_outputs, 2)} classes for {n_outputs} output(s), got {len(self)}"
                f" ({few(self)}); name the model's classes in the order of its outputs"
            )


def text_labels(y: Any) -> NDArray[np.str_] | None:
    """y as an array of text, None where it holds anything else."""
    if hasattr(y, "detach"):
        return None
    try:
        array = np.asarray(y)
    except (TypeError, ValueError):  # ragged lists: `tensors.as_pair` says what is wrong with them
        return None
    if array.ndim == 0 or array.size == 0:
        return None
    if array.dtype.kind == "U" or (
        array.dtype.kind == "O" and all(isinstance(label, str) for label in array.flat)
    ):
        labels: NDArray[np.str_] = array.astype(np.str_)
        return labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return None


def with_indices(
    train: Any, heldout: Any, classes: Sequence[str] | None
) -> tuple[Any, Any, ClassNames | None, tuple[str, ...]]:
    """train and heldout with text labels as class indices, the class names, and what was assumed.

    Numbers pass through. `classes` names the outputs in order; without it the training labels'
    sorted unique values do, which the notes say.

    Raises:
        InputError: names that repeat, a label that no class has, text in one of the two only.
    """
    labels = _labels_of(train)
    unseen = None if heldout is None else _labels_of(heldout)
    if labels is None:
        if unseen is not None:
            raise InputError(
                "expected heldout labels as numbers like the training labels, got text; map them to"
                " class indices"
            )
        return train, heldout, None, ()
    if heldout is not None and unseen is None:
        raise InputError(
            "expected heldout labels as text like the training labels, got numbers; give the names"
        )
    names = ClassNames.found_in(labels) if classes is None else ClassNames(map(str, classes))
    if not names or len(set(names)) < len(names):
        got = few(names) or "none"
        raise InputError(f"expected classes that differ, got {got}; name each output once")
    notes = (
        (f"the model names no classes: its outputs are taken to be {few(names)}, sorted",)
        if classes is None
        else ()
    )
    train = (train[0], names.indices(labels, "train y"))
    if unseen is not None:
        heldout = (heldout[0], names.indices(unseen, "heldout y"))
    return train, heldout, names, notes


def few(names: Sequence[Any] | NDArray[Any], limit: int = 8) -> str:
    """The first names in quotes, and how many more there are."""
    return first_of(names, limit, lambda name: repr(str(name)))


def _labels_of(data: Any) -> NDArray[np.str_] | None:
    """The text labels of a pair (x, y); None for numbers and for what is no pair."""
    try:
        _, y = data
    except (TypeError, ValueError):
        return None
    return text_labels(y)
