"""The mesh, for every rank in one process."""

from __future__ import annotations

import itertools

import pytest
import torch

from eagle3_ds.device.found import detect_accelerator
from eagle3_ds.topology import Mesh, check_heads, maybe_setup_distributed

SIZES = [Mesh(*sizes) for sizes in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 4))]


@pytest.mark.parametrize("mesh", SIZES, ids=str)
def test_places_and_groups_agree(mesh: Mesh) -> None:
    places = [mesh.place(rank) for rank in range(mesh.world_size)]
    assert [mesh.rank(p.dp_rank, p.ring_rank, p.ulysses_rank) for p in places] == list(range(mesh.world_size))
    for groups, size, constant in [
        (mesh.ulysses_groups(), mesh.ulysses, ("dp_rank", "ring_rank")),
        (mesh.ring_groups(), mesh.ring, ("dp_rank", "ulysses_rank")),
        (mesh.sp_groups(), mesh.sp, ("dp_rank",)),
        (mesh.dp_groups(), mesh.draft_dp, ("sp_rank",)),
    ]:
        assert sorted(itertools.chain(*groups)) == list(range(mesh.world_size))
        for group in groups:
            assert len(group) == size
            assert len({tuple(getattr(places[rank], name) for name in constant) for rank in group}) == 1
    for group in mesh.sp_groups():
        assert [places[rank].sp_rank for rank in group] == list(range(mesh.sp))


def test_ulysses_peers_are_neighbours() -> None:
    mesh = Mesh(draft_dp=2, ring=2, ulysses=2)
    assert mesh.ulysses_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.ring_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.sp_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert mesh.dp_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_world_that_does_not_divide_names_the_numbers_and_the_nearest_worlds() -> None:
    with pytest.raises(ValueError, match=r"world size 10 .* ulysses 2 x ring 2 = 4\. Start 8 or 12 ranks"):
        Mesh.from_world(10, ring=2, ulysses=2)
    with pytest.raises(ValueError, match="Start 4 ranks"):
        Mesh.from_world(1, ring=2, ulysses=2)
    with pytest.raises(ValueError, match=r"draft_dp 3 .* = 12, but the world size is 8.* to 2 or null"):
        Mesh.from_world(8, ring=2, ulysses=2, draft_dp=3)
    assert Mesh.from_world(8, ring=2, ulysses=2) == Mesh(2, 2, 2)


def test_axis_without_ranks() -> None:
    with pytest.raises(ValueError, match="parallel.ring is 0"):
        Mesh.from_world(8, ring=0, ulysses=2)


def test_ulysses_must_divide_the_heads() -> None:
    check_heads(4, 32, 8)
    with pytest.raises(
        ValueError, match=r"ulysses is 16, but it must divide 8.*32 query.*8 key/value.*ulysses to 8;.*ring"
    ):
        check_heads(16, 32, 8)
    with pytest.raises(ValueError, match="ulysses to 2;"):
        check_heads(4, 14, 2)


def test_single_process_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    topology = maybe_setup_distributed()
    assert not torch.distributed.is_initialized()
    assert topology.mesh == Mesh(1, 1, 1)
    assert topology.device == torch.device("cpu")
    groups = (
        topology.ulysses_group,
        topology.ring_group,
        topology.sp_group,
        topology.dp_group,
        topology.world_group,
    )
    assert groups == (None,) * 5
    with pytest.raises(ValueError, match="world size 1 .* Start 4 ranks"):
        maybe_setup_distributed(ulysses=4)


def test_unknown_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "abacus")
    with pytest.raises(ValueError, match="'abacus'.*cpu, cuda, npu"):
        detect_accelerator()
