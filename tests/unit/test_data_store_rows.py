"""float8 rows, and how many bytes a rank reads."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.layout import LocalRows, PackedSequence, SpanPlan, prepare_usp_input, stream_rows
from eagle3_ds.store import rows as rows_module
from eagle3_ds.store.index import RowFormat
from eagle3_ds.store.rows import (
    by_table,
    decode_float8,
    encode_float8,
    first_beyond,
    power_of_two,
    row_checksums,
)
from eagle3_ds.store.writer import HiddenStateWriter
from judge.pretend_device import without_streams

WIDTH = 128


def some_rows(length, seed, scale=1.0):
    return torch.randn(length, 3 * WIDTH, generator=torch.Generator().manual_seed(seed)) * scale


def test_powers_of_two_are_exact():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-126, 128)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(-100, 100))
def test_float8_rows_are_as_close_as_three_bits_of_mantissa_allow(seed, exponent):
    rows = some_rows(5, seed, 2.0**exponent)
    decoded = decode_float8(*encode_float8(rows, WIDTH))
    assert decoded.dtype == torch.bfloat16 and decoded.shape == rows.shape
    largest = rows.unflatten(1, (3, WIDTH)).abs().amax(-1, keepdim=True).expand(-1, -1, WIDTH).flatten(1)
    # Half a unit of the last of 4 significant bits; below 2**-6 of code, half of the smallest code, 2**-9 of
    # at most 448.
    bound = torch.maximum(rows.abs() * 2.0**-4, largest * 2.0**-10 / 224)
    assert ((decoded.float() - rows).abs() <= bound).all()


def test_each_hidden_state_has_its_own_exponent():
    rows = torch.cat(
        [torch.full((2, WIDTH), 1e-3), torch.full((2, WIDTH), 1.0), torch.full((2, WIDTH), 3e5)], dim=1
    )
    rows[1] *= 1e-4
    decoded = decode_float8(*encode_float8(rows, WIDTH)).float()
    assert ((decoded - rows).abs() <= rows.abs() / 16).all()


@pytest.mark.parametrize("value", [0.0, 448.0, 449.0, 480.0, 1e-30, 1e-44, 2.9e38, -2.9e38])
def test_extreme_values_stay_finite_and_close(value):
    rows = torch.full((1, WIDTH), value)
    decoded = decode_float8(*encode_float8(rows, WIDTH)).float()
    assert torch.isfinite(decoded).all()
    assert ((decoded - rows).abs() <= max(abs(value) / 16, 2.0**-130)).all()


def test_rows_are_encoded_and_judged_alike_in_any_number_at_once(monkeypatch):
    rows = some_rows(9, 3)
    rows[7, 5] = float("nan")
    whole = encode_float8(rows[:7], WIDTH)
    monkeypatch.setattr(rows_module, "ROWS_AT_ONCE", 2)
    for found, expected in zip(encode_float8(rows[:7], WIDTH), whole, strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert first_beyond(rows, 1e9) == 7 and first_beyond(rows[:7], 1e9) is None


def test_decoding_again_changes_nothing():
    decoded = decode_float8(*encode_float8(some_rows(9, 1), WIDTH))
    assert torch.equal(decode_float8(*encode_float8(decoded, WIDTH)), decoded)


def test_float8_halves_the_disk():
    eight, sixteen = (RowFormat(3 * 4096, 4096, dtype).row_bytes for dtype in ("float8", "bfloat16"))
    assert eight / sixteen < 0.501


def test_float8_wants_hidden_states_side_by_side():
    with pytest.raises(ValueError, match="aux rows of 7 are not hidden states of 2 side by side"):
        RowFormat(7, 2, "float8")


def test_row_checksums_tell_rows_apart_and_see_every_bit():
    rows = some_rows(6, 2).bfloat16()
    sums = row_checksums(rows)
    assert len(set(sums.tolist())) == 6
    for row in range(6):
        changed = rows.clone()
        changed.view(torch.int16)[row, row] ^= 1
        assert (row_checksums(changed) != sums).nonzero().flatten().tolist() == [row]


@pytest.fixture(scope="module", params=["bfloat16", "float8"])
def store(request, tmp_path_factory):
    """Documents of 600 to 2600 tokens, 8192 tokens in all, in pieces of at most 700 rows."""
    lengths = dict(enumerate([600, 2600, 1500, 900, 2592]))
    path = tmp_path_factory.mktemp("s") / "store"
    writer = HiddenStateWriter(
        path, lengths, RowFormat(3 * WIDTH, WIDTH, request.param), {}, shard_bytes=2**18
    )
    for document, length in lengths.items():
        aux, token = some_rows(length, document), torch.arange(length)
        for start in range(0, length, 700):
            rows = slice(start, start + 700)
            writer.append(document, aux[rows], aux[rows, :WIDTH], token[rows], start=start)
    return writer.finish()


class CountingShard:
    """A mapped shard that counts the bytes of what is sliced out of it."""

    def __init__(self, shard, count):
        self.shard, self.count = shard, count

    def get_slice(self, key):
        return CountingSlice(self.shard.get_slice(key), self.count)


class CountingSlice:
    def __init__(self, piece, count):
        self.piece, self.count = piece, count
        self.get_shape, self.get_dtype = piece.get_shape, piece.get_dtype

    def __getitem__(self, rows):
        read = self.piece[rows]
        self.count(read.nbytes if rows != slice(0, 1) or len(read) > 1 else 0)
        return read


def counted(store, monkeypatch):
    """A list that the size of every slice read from the store's shards is appended to."""
    sizes: list[int] = []
    open_shard = type(store)._open_shard
    monkeypatch.setattr(
        type(store), "_open_shard", lambda self, shard: CountingShard(open_shard(self, shard), sizes.append)
    )
    return sizes


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2)])
def test_a_rank_reads_little_more_than_its_share(store, monkeypatch, ring, ulysses):
    """What all ranks of a mesh read of 8192 tokens, halos of 7 rows and the whole column of teacher tokens
    included.
    """
    documents = list(store.lengths)
    plan = SpanPlan.make([store.lengths[document] for document in documents], ring, ulysses)
    assert plan.padded_length == plan.length
    total = sum(shape_bytes(store.layout, name, plan.length) for name in ("aux", "teacher", "teacher_token"))
    whole = store.view(documents, "aux")[:]
    sizes = counted(store, monkeypatch)
    for ring_rank in range(ring):
        for ulysses_rank in range(ulysses):
            sizes.clear()
            pack = PackedSequence(
                token_ids=torch.zeros(plan.length, dtype=torch.int64),
                loss_mask=torch.ones(plan.length, dtype=torch.bool),
                lengths=plan.lengths,
                teacher_token=store.view(documents, "teacher_token")[:].long(),
                aux=store.view(documents, "aux"),
                teacher=store.view(documents, "teacher"),
            )
            batch = prepare_usp_input(pack, plan, ring_rank, ulysses_rank, TTTSupervision(7))
            aux, _ = batch.aux[:], batch.teacher[:]
            share = total / (ring * ulysses)
            assert 0.9 * share < sum(sizes) <= 1.1 * share
            slots = plan.slots(ring_rank, ulysses_rank)
            assert torch.equal(aux, whole[torch.from_numpy(slots)])


def shape_bytes(layout, name, length):
    """Bytes of a column and its exponents."""
    return sum(
        int(np.prod(shape)) * dtype.itemsize
        for tensor, (shape, dtype) in layout.tensors(length).items()
        if tensor in (name, f"{name}_exponent")
    )


def test_rows_go_to_a_device_as_they_are_stored(store, monkeypatch):
    """A tile of float8 rows is codes and exponents until it is on the device; padding is zeros there too."""
    documents = list(store.lengths)
    slots = np.array([*range(590, 640), *range(3000, 3010), 8192, 8193])
    rows = LocalRows(store.view(documents, "aux"), slots, 8192)
    tiles = [np.arange(40), np.arange(40, len(slots))]
    for tile in tiles:
        stored, expected = rows.take_coded(tile), rows.take(tile)
        if store.layout.dtype == "float8":
            assert stored.dtype == torch.uint8 and stored.shape == (len(tile), 3 * WIDTH + 3)
        else:
            assert stored.dtype == torch.bfloat16 and stored.shape == (len(tile), 3 * WIDTH)
        assert expected.dtype == torch.bfloat16 and torch.equal(rows.decoded(stored), expected)
    assert expected[:-2].abs().amax(1).min() > 0 and not expected[-2:].any()
    places, decoded = [], rows.decoded

    def noted(codes):
        places.append((codes.device.type, codes.dtype))
        return decoded(codes)

    monkeypatch.setattr(rows, "decoded", noted)
    with without_streams():
        arrived = list(stream_rows(rows, tiles, torch.device("meta"), torch.float32))
    dtype = torch.uint8 if store.layout.dtype == "float8" else torch.bfloat16
    assert places == [("meta", dtype)] * 2
    assert [(part.shape, part.dtype) for part in arrived] == [
        ((len(tile), 3 * WIDTH), torch.float32) for tile in tiles
    ]


def test_a_table_decodes_where_float8_is_unknown():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).bfloat16()
    assert torch.equal(by_table(codes).isnan(), expected.isnan()) and int(expected.isnan().sum()) == 2
    assert torch.equal(by_table(codes)[~expected.isnan()], expected[~expected.isnan()])
