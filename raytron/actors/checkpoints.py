"""The checkpoints of a run as its controller sees them: the ranks write them, and report how they ended.

reported ──► told, counted as the newest ──► its validation loss beside it ──► old ones swept, by a thread of its own
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raytron.checkpoint.catalog import Generation, newest_good, note_validation, prune
from raytron.config import RunConfig
from raytron.data.recipe import Recipe
from raytron.data.run_data import RunData
from raytron.errors import CheckpointError, ConfigError, Problem
from raytron.observe.records import Record
from raytron.training.run_directory import RunDirectory

DATA_KEYS = ("data.dataset", "data.blend", "data.blend_block", "data.stages")
Say = Callable[..., None]  # (kind of event, message, **facts)


class Checkpoints:
    """Of one run. step: that of the newest one, None for none."""

    def __init__(self, config: RunConfig, directory: RunDirectory, say: Say):
        self.config, self.directory, self.say = config, directory, say
        self.step: int | None = None
        self._newest: tuple[int, Path] | None = None  # of this launch: its step and place
        self._validated: dict[int, float] = {}  # validation losses by step, of steps without a checkpoint yet
        self._sweeper = ThreadPoolExecutor(1, thread_name_prefix="sweeper")

    def reported(self, report: Record) -> None:
        """One has ended, well or badly."""
        step, path = int(report["step"]), Path(report["path"])
        facts = {key: value for key, value in report.items() if key != "event"}
        if report["event"] != "checkpoint":
            self.say("checkpoint_failed", f"the checkpoint of step {step} failed: {report['error']}", **facts)
            return
        self.step = step
        stalled = f", {report['stall_s']:.2f} s of them in the way" if self.config.checkpoint.background else ""
        self.say("checkpoint", f"checkpoint of step {step} in {report['seconds']:.1f} s{stalled}", **facts)
        self._newest = step, path
        self._note_validation()
        keep = self.config.checkpoint
        self._sweeper.submit(
            prune, self.directory.checkpoints, keep.keep_last, keep_every=keep.keep_every, keep_best=keep.keep_best,
            digests=False,
        )  # fmt: skip

    def validated(self, step: int, loss: float) -> None:
        """The validation loss of a step, in nats; its checkpoint may come before or after."""
        self._validated[step] = loss
        self._note_validation()

    def _note_validation(self) -> None:
        """Beside the newest checkpoint its validation loss, once both are there."""
        if self._newest is not None and self._newest[0] in self._validated:
            step, path = self._newest
            note_validation(path, self._validated.pop(step))

    def newest_good(self, data: RunData, up_to: int | None) -> Generation | None:
        """The newest generation of at most step `up_to` that verifies; damaged ones are told of. Raises ConfigError for one
        of other data."""
        generation = newest_good(self.directory.checkpoints, self._damaged, up_to=up_to)
        recorded = None if generation is None else Recipe.recorded(generation.facts)
        if generation is None or recorded is None or {"data", *DATA_KEYS} & set(self.config.resume.allow):
            return generation
        differs = recorded.difference(data.recipe, int(generation.facts["consumed"]))
        if differs is None:
            return generation
        what = f"the data is not what {generation.path.name} was trained on: {differs}"
        raise ConfigError([Problem("data", what, "use the old data, another run_dir, or resume.allow=data")])

    def _damaged(self, path: Path, error: CheckpointError) -> None:
        self.say("damaged", f"passed over {path.name}: {error}", path=str(path))

    def close(self) -> None:
        """Waits until the last old one is swept."""
        self._sweeper.shutdown()
