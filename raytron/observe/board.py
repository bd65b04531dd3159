"""The metrics of a run as TensorBoard scalars, under run_dir/tensorboard, where `observe.tensorboard` asks for it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from raytron.errors import ConfigError, Problem
from raytron.observe.records import Record

NOT_DRAWN = ("step", "request", "skipped")


class TensorBoard:
    """Raises ConfigError where the tensorboard package is missing."""

    def __init__(self, run_dir: Path | str):
        try:
            writer = import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError:
            remedy = "pip install 'raytron[tensorboard]', or leave observe.tensorboard false"
            raise ConfigError([Problem("observe.tensorboard", "the package tensorboard is missing", remedy)]) from None
        self._writer = writer(str(Path(run_dir) / "tensorboard"))

    def write(self, record: Record) -> None:
        """The numbers of one step."""
        for key, value in record.items():
            if key not in NOT_DRAWN and isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()
