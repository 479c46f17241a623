"""The loader: every pack in its turn, the same for every caller, rows in step with the documents."""

import datasets
import pytest
import torch

from eagle3_ds.data.documents import FEATURES
from eagle3_ds.data.loader import HeldoutPacks, PackedLoader, SequenceSource
from eagle3_ds.store.index import RowFormat
from eagle3_ds.store.reader import HiddenStateStore
from eagle3_ds.store.writer import HiddenStateWriter

LENGTHS = [7, 3, 9, 2, 8, 10, 4, 6, 5, 1, 10]

World = tuple[datasets.Dataset, HiddenStateStore]


def row(document, length):
    return {
        "input_ids": [document * 100 + i for i in range(length)],
        "loss_mask": [i % 2 == 1 for i in range(length)],
        "document_id": document,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Documents numbered 5, 6, ... whose hidden states repeat the token id."""
    rows = [row(index + 5, length) for index, length in enumerate(LENGTHS)]
    lengths = {document["document_id"]: len(document["input_ids"]) for document in rows}
    writer = HiddenStateWriter(
        tmp_path_factory.mktemp("s") / "store", lengths, RowFormat(3, 1, "float32"), {}
    )
    for document in rows:
        ids = torch.tensor(document["input_ids"])
        writer.append(document["document_id"], ids[:, None].expand(-1, 3), ids[:, None], ids + 1)
    return datasets.Dataset.from_list(rows, features=FEATURES), writer.finish()


def test_a_sequence_is_its_documents_end_to_end(world: World):
    dataset, store = world
    pack = SequenceSource(dataset, store).sequence([2, 0])
    ids = torch.tensor([*dataset[2]["input_ids"], *dataset[0]["input_ids"]])
    assert pack.lengths == (9, 7)
    assert torch.equal(pack.token_ids, ids) and pack.token_ids.dtype == torch.int64
    assert torch.equal(pack.teacher_token, ids + 1) and pack.teacher_token.dtype == torch.int64
    assert pack.loss_mask.tolist() == [*dataset[2]["loss_mask"], *dataset[0]["loss_mask"]]
    assert torch.equal(pack.aux[5:12], ids[5:12, None].expand(-1, 3).float())
    assert torch.equal(pack.teacher[0:16], ids[:, None].float())


@pytest.mark.parametrize("draft_dp", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_epochs_follow_each_other_without_loss(world: World, draft_dp, accumulation):
    loaders = [PackedLoader(*world, 10, draft_dp, rank, accumulation, seed=3) for rank in range(draft_dp)]
    num_packs = loaders[0].num_packs
    steps = loaders[0].steps_in(3)
    stream = []
    for step in range(steps):
        shares = [loader.pack_indices(step) for loader in loaders]
        assert all(len(share) == accumulation for share in shares)
        stream += [share[turn] for turn in range(accumulation) for share in shares]
    assert (steps - 1) * draft_dp * accumulation < 3 * num_packs <= len(stream)
    for start in range(0, len(stream) - num_packs + 1, num_packs):
        assert sorted(stream[start : start + num_packs]) == list(range(num_packs))


def test_another_batch_size_goes_on_where_the_first_stopped(world: World):
    before = PackedLoader(*world, 10, accumulation=4, seed=3)
    assert before.packs_before(2) == 8
    after = [PackedLoader(*world, 10, 3, rank, 1, seed=3, resumed=(2, 8)) for rank in range(3)]
    assert after[0].packs_before(2) == 8
    stream = [*before.pack_indices(0), *before.pack_indices(1)]
    while len(stream) < 3 * before.num_packs:
        stream += [loader.pack_indices(2 + (len(stream) - 8) // 3)[0] for loader in after]
    whole = PackedLoader(*world, 10, seed=3)
    assert stream == [whole.pack_indices(step)[0] for step in range(len(stream))]
    assert 8 + 3 * (after[0].steps_in(3) - 3) < 3 * before.num_packs <= 8 + 3 * (after[0].steps_in(3) - 2)


def test_a_step_is_a_pure_function_and_epochs_differ(world: World):
    one, other = (PackedLoader(*world, 10, seed=1) for _ in range(2))
    late = one.step(4)
    for step in range(5):
        again = other.step(step)
    assert torch.equal(late[0].token_ids, again[0].token_ids)
    orders = [
        [one.pack_indices(epoch * one.num_packs + i) for i in range(one.num_packs)] for epoch in range(3)
    ]
    assert orders[0] != orders[1] or orders[1] != orders[2]


@pytest.mark.parametrize("draft_dp", [1, 2, 4, 16])
def test_heldout_packs_give_every_rank_as_many_turns(world: World, draft_dp):
    turns = [list(HeldoutPacks(PackedLoader(*world, 10, draft_dp, rank))) for rank in range(draft_dp)]
    assert len({len(packs) for packs in turns}) == 1
    packs = [pack for rank in turns for pack in rank if pack.loss_mask.any()]
    assert sorted(length for pack in packs for length in pack.lengths) == sorted(LENGTHS)
    assert all(pack.loss_mask.any() for rank in turns for pack in rank[:-1])
    with pytest.raises(IndexError):
        HeldoutPacks(PackedLoader(*world, 10, draft_dp))[len(turns[0])]


def test_errors(world: World, tmp_path):
    dataset, store = world
    with pytest.raises(ValueError, match="no document to pack"):
        PackedLoader(dataset.select([]), store, 10)
    with pytest.raises(ValueError, match="10 tokens and a packed sequence takes 1 to 9"):
        PackedLoader(dataset, store, 9)
    stranger = datasets.Dataset.from_list([row(99, 4)], features=FEATURES)
    with pytest.raises(ValueError, match="1 of 1 are missing .* document 99 with 4 tokens .store: absent."):
        PackedLoader(stranger, store, 10)


def test_the_documents_of_a_step_one_by_one(world: World):
    loader = PackedLoader(*world, 10, draft_dp=2, dp_rank=1, accumulation=2)
    packs, documents = loader.step(1), loader.documents(1)
    singles = [loader.document(1, place) for place in range(len(documents))]
    assert [
        number for pack in packs for number in (pack.token_ids // 100).unique_consecutive().tolist()
    ] == documents
    assert torch.equal(
        torch.cat([pack.token_ids for pack in singles]), torch.cat([pack.token_ids for pack in packs])
    )
    assert all(len(pack.lengths) == 1 for pack in singles)
