"""Reading back what trackers have written, by their own packages where these can read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Read = Callable[[Path, str], dict[int, dict[str, list[float]]]]
"""(folder `trackers`, identity of the run) -> {step: {name: its values}}, of which one is right."""


def installed(name: str) -> None:
    """Skip the test, with the reason, where the tracker's package is not installed."""
    pytest.importorskip(name, reason=f"the tracker {name} is not installed: pip install 'eagle3-ds[{name}]'")


def _put(found: dict[int, dict[str, list[float]]], step: int, name: str, value: float) -> None:
    found.setdefault(step, {}).setdefault(name, []).append(value)


def read_tensorboard(folder: Path, identity: str) -> dict[int, dict[str, list[float]]]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 0}).Reload()
    found: dict[int, dict[str, list[float]]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            _put(found, event.step, name, event.value)
    return found


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of the one offline run: LevelDB's log format, which has no reader in W&B's Python."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(part)
            part = b""


def read_wandb(folder: Path, identity: str) -> dict[int, dict[str, list[float]]]:
    found: dict[int, dict[str, list[float]]] = {}
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "run":
            assert record.run.run_id == identity
        values = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
        for name, value in values.items():
            # A picture's size is a number too, and W&B's own names begin with a line.
            if not name.startswith(("_", "report/")) and isinstance(value, int | float):
                _put(found, record.history.step.num or values["_step"], name, value)
    return found


def mlflow_client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder.resolve() / 'mlflow' / 'mlflow.db'}")


def read_mlflow(folder: Path, identity: str) -> dict[int, dict[str, list[float]]]:
    client = mlflow_client(folder)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert run.info.run_id == identity
    found: dict[int, dict[str, list[float]]] = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(identity, name):
            _put(found, metric.step, name, metric.value)
    return found


def trackio_rows(folder: Path, identity: str) -> list[dict[str, Any]]:
    """Every row of the one run, read from the file, for trackio takes its folder from the process."""
    import sqlite3

    with sqlite3.connect(folder / "trackio" / "eagle3-ds.db") as file:
        rows = file.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {row[0] for row in rows} == {identity}
    return [{"step": step, **json.loads(metrics)} for _, step, metrics in rows]


def read_trackio(folder: Path, identity: str) -> dict[int, dict[str, list[float]]]:
    found: dict[int, dict[str, list[float]]] = {}
    for row in trackio_rows(folder, identity):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                _put(found, row["step"], name, value)
    return found


READERS: dict[str, Read] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


def picture_of(name: str, folder: Path, identity: str) -> int:
    """How many pictures `report` the tracker holds."""
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return len(EventAccumulator(str(folder / name)).Reload().Images("report"))
    if name == "wandb":
        return len(list((folder / name).glob("offline-run-*/files/media/images/report*.png")))
    if name == "mlflow":
        return len(mlflow_client(folder).list_artifacts(identity, "pictures"))
    return sum("report" in row for row in trackio_rows(folder, identity))


def held(name: str, folder: Path) -> dict[int, dict[str, float]]:
    """{step: {name: value}} of the run that runs.json names; each value once."""
    found = READERS[name](folder, json.loads((folder / "runs.json").read_text())[name]["identity"])
    assert {len(values) for row in found.values() for values in row.values()} == {1}
    return {step: {key: values[0] for key, values in row.items()} for step, row in found.items()}
