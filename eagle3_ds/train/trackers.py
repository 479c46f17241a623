"""The trackers that a run may write to beside metrics.jsonl: one class for each, over its own package, which
is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import logging
import netrc
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from eagle3_ds.config import Recipe, dump_recipe

logger = logging.getLogger(__name__)
PACKAGES: Mapping[str, str] = {
    "tensorboard": "tensorboard>=2.20,<3",
    "wandb": "wandb>=0.22,<1",
    "mlflow": "mlflow>=3.5,<4",
    "trackio": "trackio>=0.20,<1",
}
"""{tracker: what pip installs for it}; pyproject.toml has an extra of the same name for each."""
PROJECT = "eagle3-ds"
"""W&B's and trackio's project, and MLflow's experiment, where the environment names no other."""
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
"""What these packages would otherwise tell their makers of their own use."""
METRICS_PER_REQUEST, VALUES_PER_REQUEST = 1000, 100
"""The most metrics, and the most parameters or tags, that MLflow takes in one request."""


def missing_trackers(recipe: Recipe) -> list[str]:
    """One line, with the fix, for each tracker of the recipe whose package is not installed here."""
    asked = ", ".join(recipe.train.trackers)
    return [
        f"train.trackers is [{asked}], but the package {name} is not installed here, and each tracker is "
        f"written through its own. Install it (pip install '{PACKAGES[name]}'), or remove {name} from the "
        "list."
        for name in recipe.train.trackers
        if find_spec(name) is None
    ]


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as one level of numbers: `step_loss/0`, `heldout/loss`. The step itself is left
    out, as every tracker has a place of its own for it, and so is what is null: it was not measured.

    Raises:
        TypeError: a value is neither number, list nor mapping.
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, int | float):
            found[key] = float(value)
        elif value is not None:
            found |= {f"{key}/{name}": number for name, number in numbers_of(_by_name(key, value)).items()}
    found.pop("step", None)
    return found


def _by_name(key: str, value: object) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return {str(place): item for place, item in enumerate(value)}
    raise TypeError(f"{key} of a step's metrics is {value!r}, which is no number")


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with.

    Attributes:
        folder: of this tracker in the output folder.
        recipe: the run's; a recipe holds no secret, only names of variables.
        kept: the lines of metrics.jsonl that there are already.
        identity: of the tracker's own run, which an earlier process began; None for a new one.
        is_whole: whether that run holds just the lines of `kept`, so that it goes on from there.
    """

    folder: Path
    recipe: Recipe
    kept: Sequence[Mapping[str, Any]] = ()
    identity: str | None = None
    is_whole: bool = False

    @property
    def name(self) -> str:
        """What people see in the tracker: the name of the output folder."""
        return Path(self.recipe.output_dir).resolve().name

    def settings(self) -> dict[str, Any]:
        """The resolved recipe by section, as in recipe.resolved.yaml."""
        return self.recipe.model_dump(mode="json")


class Tracker(Protocol):
    """One open run of a tracker. Building it opens it; a run that is not whole is written anew from the lines
    that are kept, so that each step has one line, as in metrics.jsonl. All calls come from one thread.

    Attributes:
        identity: names the run to the tracker, for a later process.
    """

    identity: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, name: str, png: Path, step: int) -> None: ...

    def close(self) -> None: ...


def _log_kept(tracker: Tracker, kept: Sequence[Mapping[str, Any]]) -> None:
    for record in kept:
        tracker.log(record["step"], numbers_of(record))


class TensorBoard:
    """Event files in `trackers/tensorboard`, which hold a step when `log` returns."""

    def __init__(self, opening: Opening) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self.identity = str(opening.folder)
        if not opening.is_whole:
            shutil.rmtree(opening.folder, ignore_errors=True)
        self._writer = EventFileWriter(str(opening.folder))
        step = opening.kept[-1]["step"] if opening.kept else 0
        self._add(text_pb("recipe", f"```yaml\n{dump_recipe(opening.recipe)}```"), step)
        if not opening.is_whole:
            _log_kept(self, opening.kept)

    def _add(self, summary: Any, step: int) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        value = self._summary.Value
        self._add(self._summary(value=[value(tag=tag, simple_value=x) for tag, x in values.items()]), step)

    def picture(self, name: str, png: Path, step: int) -> None:
        image = self._summary.Image(encoded_image_string=png.read_bytes())
        self._add(self._summary(value=[self._summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run: on the server that there is a key for, else in `trackers/wandb`, for `wandb sync`.

    Offline there is one folder, written anew by each process under the same id: two of them would be two
    halves of a run, with the undone steps of a resume in one of them. On a server a step that was logged
    stays as it was logged first.
    """

    def __init__(self, opening: Opening) -> None:
        import wandb

        self._wandb = wandb
        self.identity = opening.identity or uuid.uuid4().hex[:8]
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key(os.environ) else "offline")
        if mode == "offline":
            logger.info("W&B: offline; `wandb sync %s/*run-*` uploads it", opening.folder)
            shutil.rmtree(opening.folder, ignore_errors=True)
        opening.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=opening.name,
            id=self.identity,
            resume=None if mode == "offline" else "allow",
            mode=mode,
            # W&B adds the folder `wandb`, which is the name of this tracker's.
            dir=str(opening.folder.parent),
            config=opening.settings(),
            # What was printed, the sources and the repository's state are not part of the metrics.
            settings=wandb.Settings(
                console="off", save_code=False, disable_git=True, silent=True,
                finish_timeout=60.0, finish_timeout_raises=True,
            ),
        )  # fmt: skip
        done = opening.kept[-1]["step"] if opening.kept else 0
        self._next = 0 if mode == "offline" else self._run.step
        if self._next > done + 1:
            words = "W&B cannot take back steps %d to %d, which are done again: it keeps their first lines"
            logger.warning(words, done + 1, self._next - 1)
        if mode == "offline" or not opening.is_whole:
            _log_kept(self, opening.kept)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next:
            self._run.log(dict(values), step=step)

    def picture(self, name: str, png: Path, step: int) -> None:
        # A server that holds the last step takes nothing more into it.
        self._run.log({name: self._wandb.Image(str(png))}, step=max(step, self._next))

    def close(self) -> None:
        self._run.finish()


def has_wandb_key(environ: Mapping[str, str]) -> bool:
    """Whether W&B will find a key: in a variable, or in the netrc file that `wandb login` writes."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    places = (
        [Path(environ["NETRC"])] if environ.get("NETRC") else [Path.home() / n for n in (".netrc", "_netrc")]
    )
    path = next((place for place in places if place.is_file()), None)
    return path is not None and netrc.netrc(str(path)).authenticators(host) is not None


class MLflow:
    """A run of MLflow's: on the server that MLFLOW_TRACKING_URI names, else in an SQLite file in
    `trackers/mlflow`. A run that is not whole is moved to MLflow's deleted ones, and a new one written, for
    MLflow cannot take back a step.
    """

    def __init__(self, opening: Opening) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._entities = Metric, Param, RunTag
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            opening.folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{(opening.folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=uri)
        self.identity, is_new = opening.identity or "", not opening.is_whole
        if is_new and opening.identity is not None:
            self._client.delete_run(opening.identity)
        if is_new:
            place = (
                None if os.environ.get("MLFLOW_TRACKING_URI") else (opening.folder / "artifacts").resolve()
            )
            self.identity = self._create(opening.name, place)
        else:
            self._client.update_run(self.identity, status="RUNNING")
        self._client.log_text(self.identity, dump_recipe(opening.recipe), "recipe.resolved.yaml")
        self._tell_recipe(leaves_of(opening.settings()), is_new)
        if is_new:
            _log_kept(self, opening.kept)

    def _create(self, name: str, artifacts: Path | None) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        place = None if artifacts is None else artifacts.as_uri()
        identity = found.experiment_id if found else self._client.create_experiment(experiment, place)
        return str(self._client.create_run(identity, run_name=name).info.run_id)

    def _tell_recipe(self, leaves: Mapping[str, str], is_new: bool) -> None:
        """The recipe as parameters. MLflow lets none change: those that a resume changed become tags."""
        _, param, tag = self._entities
        before = {} if is_new else self._client.get_run(self.identity).data.params
        new = [param(key, value) for key, value in leaves.items() if key not in before]
        changed = [tag(f"resumed.{k}", v) for k, v in leaves.items() if k in before and before[k] != v]
        for start in range(0, max(len(new), len(changed)), VALUES_PER_REQUEST):
            part = slice(start, start + VALUES_PER_REQUEST)
            self._client.log_batch(self.identity, params=new[part], tags=changed[part])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now, metric = int(time.time() * 1000), self._entities[0]
        found = [metric(key, value, now, step) for key, value in values.items()]
        for start in range(0, len(found), METRICS_PER_REQUEST):
            self._client.log_batch(self.identity, metrics=found[start : start + METRICS_PER_REQUEST])

    def picture(self, name: str, png: Path, step: int) -> None:
        self._client.log_artifact(self.identity, str(png), "pictures")

    def close(self) -> None:
        self._client.set_terminated(self.identity)


def leaves_of(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A recipe by dotted keys: `train.learning_rate`. Lists are one value."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= leaves_of(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


class Trackio:
    """A trackio run: in an SQLite file in `trackers/trackio`, or where trackio's own variables say
    (TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL). A run that is not whole is written anew; its old one
    is removed where it lies here, and stays under its own name on a server.
    """

    def __init__(self, opening: Opening) -> None:
        trackio = _trackio_in(os.environ.get("TRACKIO_DIR") or str(opening.folder.resolve()))
        self._trackio, self._last = trackio, 0
        self._is_here = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
        if opening.is_whole and opening.identity is not None:
            self.identity = opening.identity
        else:
            self.identity = f"{opening.name}-{uuid.uuid4().hex[:8]}"
            self._remove(opening.identity)
        self._run = trackio.init(
            PROJECT,
            self.identity,
            config=opening.settings(),
            resume="must" if opening.is_whole else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        if not opening.is_whole:
            _log_kept(self, opening.kept)

    def _remove(self, name: str | None) -> None:
        if self._is_here and name is not None:
            # A ValueError says that there is no such project, so nothing to remove.
            with suppress(ValueError):
                for run in self._trackio.Api().runs(PROJECT):
                    if run.name == name:
                        run.delete()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)
        self._last = step

    def picture(self, name: str, png: Path, step: int) -> None:
        self._run.log({name: self._trackio.Image(str(png))}, step=step)

    def close(self) -> None:
        self._run.finish()
        # trackio only warns of a line that it could not store.
        if self._is_here and self._last:
            held = self._trackio.SQLiteStorage.get_max_step_for_run(PROJECT, self.identity)
            if held != self._last:
                raise RuntimeError(f"trackio holds steps to {held}, and was given {self._last}")


def _trackio_in(folder: str) -> Any:
    """The module trackio, which writes to `folder`: it asks the environment for it while it is imported, so
    one that was imported for another run of this process is imported again.
    """
    loaded = sys.modules.get("trackio.utils")
    if loaded is not None and Path(folder) != loaded.TRACKIO_DIR:
        for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
            del sys.modules[name]
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = folder
    try:
        return importlib.import_module("trackio")
    finally:
        if before is None:
            del os.environ["TRACKIO_DIR"]


TRACKERS: Mapping[str, Callable[[Opening], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}
