"""The data of a run, ready to be read: prepared and packed where it has to be, looked at where it is there."""

from __future__ import annotations

from pathlib import Path

from raytron.config import RunConfig
from raytron.data.blend_check import validation_problems
from raytron.data.check import data_problems, text_misfits
from raytron.data.prepare import ensure_dataset, silent
from raytron.data.run_data import open_run_data
from raytron.data.shards import open_dataset
from raytron.data.text_build import ensure_text
from raytron.data.text_index import text_folder
from raytron.data.tokenize import Report
from raytron.errors import ConfigError


def ensure_data(config: RunConfig, report: Report = silent) -> Path:
    """The folder of the data set that a run reads, or of the index of its text, prepared now where it is not there yet; of a
    blend, the first one's.

    Ray must be initialised if one is to be prepared. Raises ConfigError where data sets do not fit the run or each other,
    and otherwise as `raytron.data.prepare.ensure_dataset` and `raytron.data.run_data.RunData.make_plans`.
    """
    if config.data.blend:
        folder = Path(config.data.blend[0].dataset)
        found = data_problems(config)
        for number, entry in enumerate(config.data.blend if not found else ()):
            if entry.sources:
                ensure_text(config, entry.sources, text_folder(config, number), report)
        found = found or (
            data_problems(config) if config.data.reads_text else []
        )  # how much text there is, is known now
    elif config.data.source == "text":
        folder = text_folder(config)
        text = ensure_text(config, config.data.sources, folder, report)
        found = [*text_misfits(text, config), *validation_problems(config, [text])]
    else:
        folder = ensure_dataset(config, report)
        found = validation_problems(config, [open_dataset(folder)])
    if found:
        raise ConfigError(found)
    if config.data.packing != "chop":
        open_run_data(config, folder).make_plans()
        found = data_problems(config)  # how often a source is read is known only now
        if found:
            raise ConfigError(found)
    return folder
