"""Pools: disjoint, reproducible, and clear about what is missing."""

import gzip
import struct
import sys

import numpy as np
import pytest

from benchmarks.zoo import data as d
from benchmarks.zoo.draw import draw
from benchmarks.zoo.grid import Cell

LOCAL = ["digits", "breast-cancer", "diabetes"]  # with scikit-learn


def rows(pool):
    return {row.tobytes() for row in pool.x.reshape(len(pool), -1)}


@pytest.mark.parametrize("name", LOCAL)
def test_pools_are_disjoint_standardised_and_the_same_again(name):
    found = d.pools(name)
    d.pools.cache_clear()
    again = d.pools(name)
    parts = (found.train, found.heldout, found.test)
    for part, other in zip(parts, (again.train, again.heldout, again.test), strict=True):
        assert np.array_equal(part.x, other.x)
        assert np.array_equal(part.y, other.y)
        assert part.x.dtype == np.float32
        assert np.isfinite(part.x).all()
    assert sum(len(rows(part)) for part in parts) == len(set().union(*map(rows, parts)))
    x = found.train.x if found.train.x.ndim > 2 else found.train.x[:, :3]
    assert x.mean() == pytest.approx(0.0, abs=1e-5)
    assert x.std() == pytest.approx(1.0, abs=1e-4)


def idx(values, dtype=8):
    return (
        struct.pack(f">BBBB{values.ndim}I", 0, 0, dtype, values.ndim, *values.shape)
        + values.tobytes()
    )


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, n, pack in (("train", 60, gzip.compress), ("t10k", 20, bytes)):
        end = ".gz" if part == "train" else ""
        x, y = rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(x)))
        (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(y)))
    return tmp_path


def test_idx_files_plain_or_gzipped(images):
    found = d.pools("mnist", d.Sources(images))
    assert (len(found.test), len(found.heldout), len(found.train)) == (32, 10, 38)
    assert found.train.x.shape == (38, 1, 28, 28)
    assert found.n_outputs == 10
    labels = np.concatenate([part.y for part in (found.train, found.heldout, found.test)])
    assert np.bincount(labels).tolist() == [8] * 10


def test_what_is_missing_is_named(images, monkeypatch):
    (images / "mnist" / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x0d\3")
    with pytest.raises(d.Unavailable, match="expected an idx file of bytes"):
        d.pools("mnist", d.Sources(images / "."))
    monkeypatch.setattr(d, "PLACES", dict.fromkeys(d.PLACES, images / "nowhere"))
    with pytest.raises(d.Unavailable, match=r"letter is not here: install .*r-cran-mlbench"):
        d.pools("letter", d.Sources(images / "nowhere"))
    (images / "mlbench").mkdir()
    monkeypatch.setitem(sys.modules, "rdata", None)
    with pytest.raises(d.Unavailable, match="pip install rdata"):
        d.pools("dna", d.Sources(images))
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(d.Unavailable, match="pip install statsmodels"):
        d.pools("randhie", d.Sources(images))


def test_nothing_is_downloaded_unless_asked(monkeypatch, tmp_path):
    asked = {}

    def fetch(**options):
        asked.update(options)
        rng = np.random.default_rng(0)
        bunch = type("Bunch", (), {})()
        bunch.data, bunch.target = rng.normal(size=(80, 16)), np.array(list("abcd") * 20)
        return bunch

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    monkeypatch.setattr(d, "PLACES", dict.fromkeys(d.PLACES, tmp_path / "nowhere"))
    found = d.pools("letter", d.Sources(tmp_path, download=True))
    assert asked["data_id"] == 6
    assert asked["data_home"] == str(tmp_path)
    assert found.n_outputs == 4
    assert found.train.x.shape[1:] == (16,)


def test_rare_classes_are_left_out():
    x, y = np.zeros((1000, 2)), np.array([5] * 600 + [7] * 395 + [9] * 5)
    kept, labels = d._without_rare(x, y)
    assert len(kept) == 995
    assert np.bincount(labels).tolist() == [600, 395]


def test_label_noise_replaces_its_share_by_uniform_labels():
    pool = d.Pool(np.zeros((20_000, 1), np.float32), np.zeros(20_000, np.int64))
    noisy = d.with_label_noise(pool, 0.4, 4, seed=1)
    # A replaced label is right by chance one time in four: .4 * 3/4 = .3.
    assert (noisy.y != 0).mean() == pytest.approx(0.3, abs=0.015)
    assert d.with_label_noise(pool, 0.0, 4, seed=1) is pool


def cell(**change):
    return Cell(**{"block": "b", "data": "digits", "architecture": "mlp", "n": 50,
                   "weight_decay": 0.1, "optimizer": "sgd"} | change)  # fmt: skip


def test_cells_of_a_group_share_samples():
    small, large, other = draw(cell(n=30)), draw(cell()), draw(cell(seed=1))
    assert np.array_equal(small.train.x, large.train.x[:30])
    assert not np.array_equal(large.train.x, other.train.x)
    assert not rows(large.train) & (rows(large.heldout) | rows(large.test))
    noisy = draw(cell(label_noise=0.5))
    assert np.array_equal(noisy.train.x, large.train.x)
    for part in ("train", "heldout", "test"):
        share = (getattr(noisy, part).y != getattr(large, part).y).mean()
        assert 0.3 < share < 0.6


def test_early_stopping_sets_samples_aside_that_are_not_trained_on():
    found, plain = draw(cell(early_stopping=True)), draw(cell())
    assert (len(found.train), len(found.validation)) == (40, 10)
    assert np.array_equal(np.concatenate([found.train.x, found.validation.x]), plain.train.x)
    assert plain.validation is None


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match=r"expected n of at most 855 for digits, got 9000"):
        draw(cell(n=9000))
    with pytest.raises(ValueError, match="classes among n = 5"):
        draw(cell(architecture="glm", n=5, optimizer="converged"))
