"""Training beside a server, against training from the store that the same server filled: the same numbers, to
the bit, and no row asked twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ds.config import load_recipe
from eagle3_ds.run.served_states import streaming
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train.main import build_loaders, build_trainer, open_states
from tests.ranks.test_target_training import STEPS, Job
from tests.unit.fake_server import FakeServer
from tests.unit.served_target import server_of_target

pytestmark = pytest.mark.ranks
MESHES: dict[str, tuple[int, tuple[str, ...]]] = {
    "ring2-ulysses2": (4, ("parallel.ring=2", "parallel.ulysses=2")),
    "dp2-ring2": (4, ("parallel.ring=2", "parallel.draft_dp=2", "train.accumulation=2")),
    "one": (1, ()),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def server(job: Job) -> Iterator[FakeServer]:
    with server_of_target(job.root / "target", job.root / "rows").running() as fake:
        yield fake


def rank_of_training(path: str) -> list[tuple[Any, ...]]:
    """Losses and gradient norms of three steps and of a held-out evaluation, as they are, and a digest of the
    weights after them.
    """
    torch.set_num_threads(1)
    recipe = load_recipe(path)
    topology = maybe_setup_distributed(
        recipe.parallel.ulysses, recipe.parallel.ring, recipe.parallel.draft_dp
    )
    states = open_states(recipe, topology)
    try:
        trainer = build_trainer(recipe, topology)
        loader, heldout = build_loaders(recipe, topology, states)
        reports = []
        for index in range(STEPS):
            reports.append(trainer.step(loader.step(index)))
            # The packs that are ahead stay ahead while others are asked for in between.
            reports.append(trainer.evaluate(heldout))
        figures = [(report.loss, report.grad_norm, report.tokens, report.tau) for report in reports]
        digest = hashlib.sha256()
        for name, weight in sorted(trainer.state_dict().items()):
            digest.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
        return [*figures, (digest.hexdigest(),)]
    finally:
        states.close()


@pytest.mark.parametrize(
    ("mesh", "dtype", "is_stock"),
    [
        *((mesh, "float32", False) for mesh in MESHES),
        ("one", "float8", False),
        ("ring2-ulysses2", "float32", True),
    ],
)
def test_a_stream_trains_as_its_store_does_to_the_bit(
    job: Job,
    server: FakeServer,
    run_ranks: Any,
    monkeypatch: pytest.MonkeyPatch,
    mesh: str,
    dtype: str,
    is_stock: bool,
) -> None:
    """With `is_stock` our connector fills the store, and vLLM's own gives the stream."""
    ranks, cut = MESHES[mesh]
    words = [*cut, f"data.hidden_dtype={dtype}", "target.capture=server", f"target.server.url={server.url}"]
    words += [f"target.server.folder={server.folder}", "target.server.buffer_gib=0.001"]
    offline = job.recipe(
        *words, f"data.cache_dir={job.root / 'filled'}", f"output_dir={job.root / 'offline'}"
    )
    expected = run_ranks(ranks, rank_of_training, job.prepared(offline))
    asked = len(server.asked)
    words += [f"data.cache_dir={job.root / 'none'}", f"output_dir={job.root / 'stream'}"]
    stream = job.recipe(*words, "data.hidden_states=stream")
    path = job.prepared(stream)
    monkeypatch.setattr(server, "is_stock", is_stock)
    with streaming(stream, num_hosts=1):
        assert run_ranks(ranks, rank_of_training, path) == expected
    assert len(server.asked) > asked, "the rows came from elsewhere"
    assert expected[0][0][0] != expected[0][2][0], "three steps, and nothing was learnt"
    assert not list((job.root / "none").glob("hidden-*"))
    assert not list(server.folder.iterdir()), "files were left"


def test_the_ranks_find_the_server_and_it_is_tried_before_they_start(job: Job, server: FakeServer) -> None:
    words = ["data.hidden_states=stream", "target.capture=server", f"target.server.url={server.url}"]
    words += [f"target.server.folder={server.folder}", f"output_dir={job.root / 'tried'}"]
    recipe = job.recipe(*words)
    job.prepared(recipe)
    with streaming(recipe, num_hosts=2):
        found = json.loads(Path(recipe.output_dir, "prepared.json").read_text())["server"]
    assert found == {"url": server.url, "folder": str(server.folder)}
    right = server.about["layer_ids"]
    server.about["layer_ids"] = "1,2,3,7"
    try:
        with pytest.raises(ValueError, match="layers 1,2,3,7, and the recipe needs"), streaming(recipe, 1):
            pass
    finally:
        server.about["layer_ids"] = right
