"""One tensor, several by position, several by name: the container and audits through it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from flataudit import InputError, audit
from flataudit.inputs import Inputs
from flataudit.tensors import as_pair, digest
from tests.cases import BY_NAME, build

A = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
IDS = torch.arange(8).reshape(4, 2)
MASK = torch.tensor([[True, False]] * 4)
Y = torch.tensor([0, 1, 1, 0])


def test_slices_and_rows():
    inputs = Inputs.of({"a": A, "mask": MASK})
    assert len(inputs) == 4
    assert inputs[1:3].names == ("a", "mask")
    assert torch.equal(inputs[1:3].parts[1], MASK[1:3])
    assert torch.equal(inputs[[0, 0]].parts[0], A[[0, 0]])
    assert torch.equal(inputs[torch.tensor([3])].parts[0], A[[3]])
    assert inputs.values_per_sample == 5
    assert Inputs.of(A[:, 0]).values_per_sample == 1


def test_only_floats_change_their_dtype():
    inputs = Inputs.of((A, IDS, MASK)).to(torch.float32, torch.device("cpu"))
    assert [part.dtype for part in inputs.parts] == [torch.float32, torch.int64, torch.bool]


def test_texts_for_messages():
    assert (Inputs.of(A).shapes, Inputs.of(A).shapes_of_any) == ("(4, 3)", "(m, 3)")
    assert Inputs.of((A, MASK)).shapes == "(4, 3), (4, 2)"
    assert (
        Inputs.of({"a": A, "m": MASK}).description == "a (4, 3) torch.float64, m (4, 2) torch.bool"
    )


def test_pairs_of_several_inputs():
    x, _ = as_pair(({"a": A.float().numpy(), "ids": IDS, "mask": MASK.numpy()}, Y), "train")
    assert x.names == ("a", "ids", "mask")
    assert [part.dtype for part in x.parts] == [torch.float64, torch.int64, torch.bool]
    x, _ = as_pair(((A, IDS.numpy()), Y), "train")
    assert (x.names, len(x.parts)) == (None, 2)
    x, _ = as_pair((((1.0, 2.0), (3.0, 4.0)), [0, 1]), "train")  # nested tuples are one array
    assert x.parts[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_digest_tells_names_apart_and_not_their_order():
    def sha(x):
        return digest(*as_pair((x, Y), "train"))

    assert sha({"a": A, "ids": IDS}) == sha({"ids": IDS, "a": A})
    others = ({"a": A, "b": IDS}, {"a": A}, A, (A, IDS), (IDS, A), {"ids": A, "a": IDS})
    assert len({sha({"a": A, "ids": IDS}), *map(sha, others)}) == 7
    assert sha((A,)) == sha(A)


class TwoInputs(nn.Module):
    """Token ids with a mask, as text classifiers take them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weight = mask[:, :, None].to(self.head.weight.dtype)
        return self.head(torch.tanh((self.embed(ids) * weight).sum(dim=1) / weight.sum(dim=1)))


def data(n: int = 40) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 9, (n, 5), generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (n, 1), generator=generator)
    return {"ids": ids * mask, "mask": mask}, torch.randint(0, 3, (n,), generator=generator)


def text_model() -> TwoInputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return TwoInputs()


def same(first, second) -> None:
    assert second.gap.value == pytest.approx(first.gap.value, rel=1e-10)
    np.testing.assert_allclose(second.samples.loo, first.samples.loo, rtol=1e-9, atol=1e-12)


def test_by_name_by_position_and_in_one_tensor_are_the_same():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = text_model()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[:, 0], x[:, 1].bool())

    x, y = data()
    held = {name: array[:9].numpy() for name, array in reversed(x.items())}
    options = {"penalty": 0.02, "solver": "dual"}
    by_name = audit(text_model(), (x, y), heldout=(held, y[:9].numpy()), **options)
    by_position = audit(text_model(), (tuple(x.values()), y), chunk_size=7, **options)
    joined = audit(Joined(), (torch.stack([x["ids"], x["mask"].long()], dim=1), y), **options)
    same(by_name, by_position)
    same(by_name, joined)
    assert by_name.data.n_samples == 40
    assert by_name.data.heldout_samples == 9
    assert len({by_name.data.sha256, by_position.data.sha256, joined.data.sha256}) == 3


@pytest.mark.parametrize("exported_by", ["position", "name"])
def test_exported_graphs_take_names_either_way(exported_by):
    x, y = data()
    n = Dim("n", min=2, max=999)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if exported_by == "name":
            shapes = {"ids": {0: n}, "mask": {0: n}}
            graph = export(text_model().eval(), (), x, dynamic_shapes=shapes).module()
        else:
            shapes = ({0: n}, {0: n})
            graph = export(text_model().eval(), tuple(x.values()), dynamic_shapes=shapes).module()
        found = audit(graph, (x, y), penalty=0.02)
        backwards = audit(graph, (dict(reversed(x.items())), y), penalty=0.02)
    same(audit(text_model(), (x, y), penalty=0.02), found)
    same(found, backwards)


X2, Y2 = data()
REFUSED = {
    "unknown name": ({"ids": X2["ids"], "pad": X2["mask"]}, ("forward(ids, mask)", "ids, pad")),
    "missing name": ({"ids": X2["ids"]}, ("forward(ids, mask)", "got ids", "'mask'")),
    "one array": (X2["ids"], ("forward(ids, mask)", "1 by position", "dict of arrays")),
    "three": ((X2["ids"], X2["mask"], X2["ids"]), ("forward(ids, mask)", "3 by position")),
    "lengths": ({"ids": X2["ids"], "mask": X2["mask"][1:]}, ("same length", "mask (39, 5)")),
    "all too long": ((X2["ids"][1:], X2["mask"][1:]), ("same length", "(39, 5), (39, 5)")),
    "nan": ({"ids": X2["ids"], "mask": X2["mask"] * torch.nan}, ("train mask", "40 of 40")),
    "text": ({"ids": np.full((40, 5), "a"), "mask": X2["mask"]}, ("train x['ids']", "<U1")),
    "no names": ({0: X2["ids"], 1: X2["mask"]}, ("names to arrays", "key 0")),
    "empty": ({}, ("numbers in train x",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    x, parts = REFUSED[name]
    with pytest.raises(InputError) as caught:
        audit(text_model(), (x, Y2), penalty=0.02)
    message = str(caught.value)
    assert all(part in message for part in ("expected", "got", *parts)), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "held",
    [{"ids": X2["ids"]}, tuple(X2.values()), {"ids": X2["ids"], "mask": X2["mask"][:, :4]}],
)
def test_heldout_data_must_have_the_same_inputs(held):
    with pytest.raises(
        InputError, match=r"expected heldout x of shape ids \(m, 5\), mask \(m, 5\)"
    ):
        audit(text_model(), (X2, Y2), heldout=(held, Y2), penalty=0.02)


def test_outputs_and_derivatives_belong_to_one_function():
    """torch's fused attention zeroes padded positions, and runs only without gradients."""
    built = build(BY_NAME["text_padding_pooled"])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on nested tensors, which the kernel makes
        fused = built.model(**built.x)
    assert float((fused - built.problem.outputs).abs().max()) > 0.01
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.enable_grad():
        plain = built.model(**built.x)
    torch.testing.assert_close(plain.detach(), built.problem.outputs, rtol=1e-12, atol=1e-12)
    (note,) = audit(built.model, (built.x, built.y), penalty=0.02).model.notes
    assert "fused attention" in note
    masked = build(BY_NAME["text_by_name"])
    assert audit(masked.model, (masked.x, masked.y), penalty=0.02).model.notes == ()


def test_chunks_change_nothing():
    whole = build(BY_NAME["text_by_name"]).problem
    for size in (1, 3):
        parts = build(BY_NAME["text_by_name"], chunk_size=size).problem
        rows = [parts.rows(at) for at in parts.chunks(1)]
        torch.testing.assert_close(torch.cat(rows), whole.rows(slice(0, 8)), rtol=1e-12, atol=1e-13)
