"""The directory of a run, and what may change when a run goes on in it.

    run_dir/config.yaml      the complete configuration of the latest start, the LR horizon fixed when the run began
            metrics.jsonl    one line for each committed step
            events.jsonl     what happened, and why
            checkpoints/     generations, where `checkpoint.directory` names no other place
            times/           what actions took, where a run has measured them
            trace/           its timeline, where `observe.trace_steps` asks for it
            data/            the data set, where the run prepared it
            text/            the index of text that is tokenized as it is read
            tokenizer.json   that of the data set
            controller.json  how to reach the run while it lives

A run may go on with more steps, on another mesh, with other cadences. What changes the result may not change, unless
`resume.allow` names it: model, data, seed, batch, optimizer, learning rate. What a live run changed of its learning rate
(`lr.changes`) holds when it goes on. A blend may get other stages and more sources
where no sample that the run has read becomes another one (`raytron.data.recipe`).
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from raytron.checkpoint.catalog import Generation, checkpoints_of, committed
from raytron.checkpoint.storage import scheme_of
from raytron.config import RunConfig, flatten, load, to_mapping, to_yaml
from raytron.errors import ConfigError, Problem

MAY_CHANGE = (
    "steps", "name", "run_dir", "micro_batch_size", "mesh.*", "pipeline.*", "data_parallel.*", "memory.*", "checkpoint.*",
    "evaluate.*", "guard.*", "observe.*", "cluster.*", "recovery.*", "elastic.*", "resume.*",
    "data.blend", "data.blend_block", "data.stages", "data.validation", "data.prefetch", "data.feed",
    "data.tokenizer.backend",
)  # fmt: skip
TOLD_BY_RECIPE = (  # of a blend: which samples it names is compared with the checkpoint's recipe, not key by key
    "data.dataset", "data.source", "data.sources", "data.format", "data.text_key", "data.messages_key", "data.chat_template",
    "data.metadata_keys", "data.on_bad_record", "data.validation_fraction", "data.shard_mb", "data.max_mb",
    "data.text_fill", "data.tokenizer.*",
)  # fmt: skip


@dataclass(frozen=True)
class RunDirectory:
    """Names the files of a run. elsewhere: the place of its checkpoints; None: as its config.yaml says."""

    path: Path
    elsewhere: Path | None = None

    @classmethod
    def of(cls, config: RunConfig) -> RunDirectory:
        """That of a run which is about to begin or to go on."""
        path, stated = Path(config.run_dir), config.checkpoint.directory
        return cls(path, path / "checkpoints" if stated is None else Path(stated))

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A folder, or a place in an object store (`raytron.checkpoint.storage`)."""
        return checkpoints_of(self.path) if self.elsewhere is None else self.elsewhere

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def controller(self) -> Path:
        return self.path / "controller.json"

    def newest(self) -> Generation | None:
        """The newest committed generation, not verified."""
        return next(iter(committed(self.checkpoints)), None)

    def stored(self) -> RunConfig | None:
        """The configuration that the run was started with before. Raises ConfigError if it is unreadable."""
        return load(self.config) if self.config.exists() else None

    def write_config(self, config: RunConfig) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.config, to_yaml(config))

    def write_controller(self, facts: dict[str, Any] | None) -> None:
        """Says how to reach the run; None: it can't be reached any more."""
        if facts is None:
            self.controller.unlink(missing_ok=True)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_text(self.controller, json.dumps(facts))

    def read_controller(self) -> dict[str, Any] | None:
        try:
            facts = json.loads(self.controller.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        return facts if isinstance(facts, dict) else None


def occupied(directory: RunDirectory) -> list[Problem]:
    """A problem where another process of this host runs in a directory: two would write one set of files."""
    facts = directory.read_controller() or {}
    pid = facts.get("pid")
    if facts.get("host") != socket.gethostname() or not isinstance(pid, int) or pid == os.getpid():
        return []
    try:
        os.kill(pid, 0)
    except ProcessLookupError:  # it died without a word
        return []
    except PermissionError:  # it lives, as another user's
        pass
    what = f"a run is at work in {directory.path}, launched by process {pid}"
    return [Problem("run_dir", what, f"attach to it, stop it (raytron stop {directory.path}), or use another run_dir")]


def settle(config: RunConfig) -> tuple[RunConfig, list[Problem]]:
    """The configuration as it will be run: absolute places, the LR horizon fixed; and what forbids to go on with it.

    Steps to be traced that are past are forgotten where the schedule is `auto`, which then measures the next ones.
    A run that has committed no generation yet has nothing to go on with: it may begin anew in any way.
    """
    config = config.replace(run_dir=_absolute(config.run_dir))
    stated = config.checkpoint.directory
    if stated is not None and scheme_of(stated) is None:
        config = config.replace(**{"checkpoint.directory": _absolute(stated)})
    config = config.replace(
        **{
            f"data.{key}": [{**to_mapping(each), "dataset": _absolute(each.dataset)} for each in entries]
            for key, entries in (("blend", config.data.blend), ("validation", config.data.validation))
        }
    )
    directory = RunDirectory.of(config)
    newest = directory.newest()
    try:
        before = directory.stored() if newest is not None else None
    except ConfigError as error:
        return config, list(error.problems)
    if config.lr.decay_steps is None:
        config = config.replace(**{"lr.decay_steps": config.steps if before is None else before.lr_horizon})
    if before is not None and not config.lr.changes and not any(key.startswith("lr") for key in config.resume.allow):
        config = config.replace(**{"lr.changes": to_mapping(before.lr)["changes"]})
    traced = config.observe.trace_steps
    if config.pipeline.schedule == "auto" and newest is not None and traced is not None and traced[-1] <= newest.step:
        config = config.replace(**{"observe.trace_steps": None})
    return config, [] if before is None else differences(before, config)


def differences(before: RunConfig, now: RunConfig) -> list[Problem]:
    """Each key that differs between the configuration of a run directory and another one, and may not."""
    old, new = flatten(to_mapping(before)), flatten(to_mapping(now))
    told = TOLD_BY_RECIPE if now.data.blend else ()
    allowed = (*MAY_CHANGE, *told, *now.resume.allow, *(f"{key}.*" for key in now.resume.allow))
    return [
        Problem(
            key,
            f"is {new[key]!r}, but the run in {now.run_dir} was begun with {old[key]!r}",
            f"take the old value, use another run_dir, or name it in resume.allow (resume.allow={key})",
        )
        for key in new
        if old[key] != new[key] and not any(fnmatchcase(key, pattern) for pattern in allowed)
    ]


def _absolute(path: str) -> str:
    """A place on the disk as every process finds it; nothing stays nothing."""
    return str(Path(path).expanduser().absolute()) if path.strip() else path


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
