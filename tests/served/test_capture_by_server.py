"""Hidden states from a real vLLM: the store is the one that transformers gives, and so is the training from
it; a server that is killed midway costs nothing but its last documents.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from eagle3_ds.serving import process
from eagle3_ds.store import HiddenStateStore, HiddenStateWriter
from tests.e2e.small_quickstart import Job, small_job
from tests.served.on_cpu import ON_CPU, vllm

pytestmark = pytest.mark.e2e
# Heads of 32 are vLLM's least. Long documents of the quickstart are cut into chunks of 64 tokens.
OVERRIDES = (
    "target.build.hidden_size=128",
    "target.build.intermediate_size=128",
    "target.build.vocab_size=512",
    "target.build.steps=2",
    "target.build.sequence_length=128",
    "draft.vocab_size=256",
    "data.max_conversations=16",
    "data.max_length=1024",
    "data.workers=1",
    "parallel.ulysses=1",
    "parallel.ring=1",
    "train.steps=3",
    "train.eval_every=0",
    "eval.num_prompts=0",
)
SERVED = (
    "target.capture=server",
    "target.server.arguments=[--enforce-eager, --max-num-seqs=8, --max-num-batched-tokens=64]",
    "target.server.concurrency=2",
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)


def job(places: Path, name: str, *more: str) -> Job:
    """A run with a cache of its own and the target that all share."""
    own = (f"data.cache_dir={places / name / 'cache'}", *OVERRIDES, *more)
    return small_job(places, places / name / "output", *own)


def store_of(places: Path, name: str) -> HiddenStateStore:
    (folder,) = (places / name / "cache").glob("hidden-*")
    return HiddenStateStore.open(folder)


@pytest.fixture(scope="module")
def by_transformers(places: Path) -> Job:
    run = job(places, "transformers")
    status, output = run.call("prepare")
    assert status == 0, output
    return run


def left_of(group: int) -> list[str]:
    """The processes of a group that still run; a dead one that nobody has waited for does not."""
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return [state for state, _, of, *_ in stats if int(of) == group and state not in "ZX"]


def require_same(found: HiddenStateStore, expected: HiddenStateStore) -> None:
    assert found.lengths == expected.lengths
    assert max(found.lengths.values()) > 64, "no document was cut into chunks"
    found.verify()
    for document, length in found.lengths.items():
        for name in ("aux", "teacher"):
            wanted = expected.rows(document, name, 0, length)
            errors = (found.rows(document, name, 0, length) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
            assert errors.max() <= 1e-5, f"{name} of document {document}: relative error {errors.max():.2e}"
        tokens = [store.rows(document, "teacher_token", 0, length) for store in (found, expected)]
        assert torch.equal(*tokens), document


def test_the_store_and_the_training_are_those_of_transformers(
    served_python: str, by_transformers: Job, places: Path
) -> None:
    run = job(places, "server", *SERVED, f"target.server.python={served_python}")
    for each in (run, by_transformers):
        status, output = each.call("launch", "--num_ranks", "1")
        assert status == 0, output
    require_same(store_of(places, "server"), store_of(places, "transformers"))
    losses = [[step["loss"] for step in each.metrics()] for each in (run, by_transformers)]
    assert len(losses[0]) == 3
    for found, expected in zip(*losses, strict=True):
        assert abs(found - expected) <= 1e-4, losses


def test_the_store_by_vllms_own_connector_is_that_of_transformers(
    served_python: str, by_transformers: Job, places: Path
) -> None:
    rows, here = places / "stock-rows", places / "stock-server"
    here.mkdir()
    shutil.copy(Path(__file__).with_name("stock_on_cpu.py"), here)
    layers = json.loads((places / "target" / "config.json").read_text())["num_hidden_layers"]
    ids = [2, layers // 2, layers - 3, layers]
    words = process.connector_arguments(ids, rows)
    words[-1] = json.dumps(
        {
            "kv_connector": "StockOnCpu",
            "kv_connector_module_path": "stock_on_cpu",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(rows)},
        }
    )
    rows.mkdir()
    with vllm(served_python, places / "target", here, "--max-num-batched-tokens=64", *words) as (url, _):
        run = job(
            places,
            "stock",
            "target.capture=server",
            f"target.server.url={url}",
            f"target.server.folder={rows}",
            "target.server.concurrency=4",
        )
        status, output = run.call("prepare")
    assert status == 0, output
    assert output.count(f"eagle_aux_hidden_state_layer_ids are {ids}") == 1, output
    require_same(store_of(places, "stock"), store_of(places, "transformers"))
    assert not list(rows.iterdir())


def test_a_killed_server_is_told_and_the_next_run_goes_on(
    served_python: str, by_transformers: Job, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, written = job(places, "killed", *SERVED, f"target.server.python={served_python}"), 0
    started: list[int] = []
    real_append, real_popen = HiddenStateWriter.append, process.subprocess.Popen

    def popen(*arguments, **options):
        server = real_popen(*arguments, **options)
        if any("vllm.entrypoints" in word for word in arguments[0]):
            started.append(server.pid)
        return server

    def append(self, *arguments, **options):
        nonlocal written
        real_append(self, *arguments, **options)
        written += 1
        if written == 2:
            os.kill(started[0], signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(process.subprocess, "Popen", popen)
        patched.setattr(HiddenStateWriter, "append", append)
        status, output = run.call("prepare")
    assert status == 2, output
    assert "ended by signal 9" in output and "last lines" in output, output
    deadline = time.monotonic() + 20  # on a busy machine a killed process takes a while to go
    while left_of(started[0]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left_of(started[0])
    done = written
    status, output = run.call("prepare")
    assert status == 0, output
    assert f"{done} documents are there already" in output
    store = store_of(places, "killed")
    require_same(store, store_of(places, "transformers"))
    pieces = [piece for shard in store.shards.values() for piece in shard.pieces]
    assert sum(piece.length for piece in pieces) == sum(store.lengths.values())


SPOILED = """
import sys
from pathlib import Path
from types import SimpleNamespace as Some
from eagle3_ds_connector import RowsConnector
connector = RowsConnector.__new__(RowsConnector)
connector.folder, connector._saves, connector._spoiled = Path(sys.argv[1]), [], set()
connector._vllm_config = Some(model_config=Some(max_model_len=100))
def step(**tokens):
    new = [Some(req_id=name, num_computed_tokens=50) for name in tokens]
    cached = Some(req_ids=[], num_computed_tokens=[])
    connector.build_connector_meta(
        Some(scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens=tokens))
def finish(name, prefix="run", status="FINISHED_LENGTH_CAPPED"):
    asked = {"eagle3_ds_prefix": prefix} if prefix else None
    ended = Some(name=status)
    request = Some(request_id=name, kv_transfer_params=asked, prompt_token_ids=[1, 2], status=ended)
    return connector.request_finished(request, [3])
step(a=49)
assert finish("a") == (True, {"eagle3_ds_rows": "run-a"}), "49 + 50 tokens and the answer fit into 100"
step(b=10, c=50)
assert finish("b") == (False, {"eagle3_ds_rows": "run-b"}), "c reaches 100 in the step of b"
step(d=10)
assert finish("d")[0] and not finish("e", prefix=None)[0] and not finish("f", status="FINISHED_ABORTED")[0]
assert [save.name for save in connector._saves] == ["run-d"], connector._saves
"""


def test_rows_of_a_step_that_vllm_left_out_are_not_given(served_python: str, tmp_path: Path) -> None:
    (tmp_path / "eagle3_ds_connector.py").write_text(process.CONNECTOR.read_text())
    done = subprocess.run(
        [served_python, "-c", SPOILED, str(tmp_path)],
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [file.name for file in tmp_path.glob("*.failed")] == ["run-b.failed"]
    assert "--max-model-len" in (tmp_path / "run-b.failed").read_text()
