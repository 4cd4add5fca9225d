"""Send metrics to TensorBoard, Weights & Biases and trackio.

A tracker that fails is dropped with a warning; the training continues, and metrics.jsonl is complete without it.
"""

from __future__ import annotations

import importlib.util
import io
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeAlias

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from lit_fast.config import Config, flatten
from lit_fast.errors import UserError, first_line
from lit_fast.storage.files import is_file, local_path, make_directory
from lit_fast.storage.paths import absolute, join, name
from lit_fast.storage.text_files import read_object, write_json
from lit_fast.utils.output import status

# Limits on the time that wandb waits for its server. A preempted machine has little time to finish.
_WANDB_START_SECONDS, _WANDB_FINISH_SECONDS = 30.0, 20.0
_FLUSH_SECONDS = 5.0  # interval at which TensorBoard's events are flushed

Tracker: TypeAlias = "TensorBoard | WeightsAndBiases | Trackio"


def check_trackers(config: Config) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for tracker in config.log.trackers:
        if tracker != "tensorboard" and importlib.util.find_spec(tracker) is None:
            raise UserError(
                f'log.report_to names {tracker}, which is not installed; run: pip install "lit-fast[{tracker}]" or '
                f"remove {tracker} from log.report_to"
            )


class Trackers:
    """All trackers of a run.

    Args:
      start_step: the step from which the run starts or resumes.
      sent_step: the last step that an earlier process has sent; after a kill it may be later than start_step.
    """

    def __init__(self, workdir: str, config: Config, start_step: int, sent_step: int) -> None:
        openers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(workdir, start_step),
            "wandb": lambda: WeightsAndBiases(workdir, config),
            "trackio": lambda: Trackio(workdir, config, sent_step),
        }
        self._open: dict[str, Tracker] = {}
        for tracker in config.log.trackers:
            with self._drop_on_error(tracker):
                self._open[tracker] = openers[tracker]()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Send the metrics after `step` updates to all trackers."""
        for tracker in list(self._open):
            with self._drop_on_error(tracker):
                self._open[tracker].write(step, values)

    def close(self) -> None:
        """Close all trackers."""
        for tracker in list(self._open):
            with self._drop_on_error(tracker):
                self._open.pop(tracker).close()

    @contextmanager
    def _drop_on_error(self, tracker: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(tracker, None)
            status(
                f"warning: {tracker}: {first_line(error)}; continuing without it, metrics.jsonl is complete"
            )


class TensorBoard:
    """TensorBoard events in W/tensorboard; later ones than `start_step` are hidden.

    The caller's thread writes them. The thread of `tensorboardX.SummaryWriter` ends without notice on a full disk, and
    its queue then blocks the training.
    """

    def __init__(self, workdir: str, start_step: int) -> None:
        directory = join(workdir, "tensorboard")
        make_directory(directory)
        self._events = EventsWriter(local_path(join(directory, "events")))
        self._events.write_event(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = 0.0

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add a scalar per metric."""
        now = time.time()
        for metric, value in values.items():
            self._events.write_event(Event(step=step, wall_time=now, summary=scalar(metric, value)))
        if now - self._flushed > _FLUSH_SECONDS:
            self._flushed = now
            self._events.flush()

    def close(self) -> None:
        """Flush the events to the disk."""
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases. Its id in W/wandb.json serves to resume it.

    wandb's environment variables win: WANDB_PROJECT, WANDB_NAME, WANDB_RUN_ID, WANDB_DIR, WANDB_MODE and all others.
    Without a server the run is kept in W/wandb, for `wandb sync`.
    """

    def __init__(self, workdir: str, config: Config) -> None:
        self._workdir, self._config = workdir, config
        self._id = os.environ.get("WANDB_RUN_ID") or _identity(workdir, "wandb", "id", uuid.uuid4().hex[:8])
        try:
            self._run = self._start(None)
        except Exception as error:  # of many types, also those of the network
            import wandb

            directory = join(os.environ.get("WANDB_DIR") or workdir, "wandb")
            status(f"warning: wandb: {first_line(error)}; the run is kept in {directory}, for `wandb sync`")
            wandb.teardown()  # it holds the id of the run that did not start
            self._run = self._start("offline")

    def _start(self, mode: Any) -> Any:
        import wandb

        environment = os.environ.get
        return wandb.init(
            project=environment("WANDB_PROJECT") or self._config.log.project,
            name=environment("WANDB_NAME") or _run_name(self._workdir),
            id=self._id,
            resume="allow",
            mode=mode,
            dir=environment("WANDB_DIR") or local_path(self._workdir),
            config=flatten(self._config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                login_timeout=_WANDB_START_SECONDS,
                init_timeout=_WANDB_START_SECONDS,
                finish_timeout=_WANDB_FINISH_SECONDS,
            ),
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log the metrics; wandb ignores steps that it has received already."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Send the rest, for at most 20 seconds."""
        import wandb

        self._run.finish()
        wandb.teardown()  # only then all data are on the disk


class Trackio:
    """A run of trackio. Its name in W/trackio.json serves to resume it.

    It is stored on this machine, where `trackio show` displays it, unless trackio's environment variables name a
    directory, Space or server: TRACKIO_PROJECT, TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL.
    """

    def __init__(self, workdir: str, config: Config, sent_step: int) -> None:
        import trackio

        self._sent_step, self._trackio = sent_step, trackio
        project = os.environ.get("TRACKIO_PROJECT") or config.log.project
        # trackio resumes by name, so a name must be unique within the project.
        run = _identity(workdir, "trackio", "name", f"{_run_name(workdir)}-{uuid.uuid4().hex[:8]}")
        with redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=project, name=run, config=flatten(config), resume="allow", embed=False
            )
        status(f'trackio: run {run}; show it with: trackio show --project "{project}"')

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log the metrics, unless this step was sent before: trackio would keep both."""
        if step > self._sent_step:
            self._trackio.log(values, step=step)

    def close(self) -> None:
        """Store the rest."""
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


def _identity(workdir: str, tracker: str, key: str, new: str) -> str:
    """Read `key` from W/<tracker>.json; without that file, create it with `new`."""
    file = join(workdir, f"{tracker}.json")
    if not is_file(file):
        write_json(file, {key: new})
    return read_object(file, key)[key]


def _run_name(workdir: str) -> str:
    return name(absolute(workdir))
