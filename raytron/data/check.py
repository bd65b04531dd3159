"""What can be said about a run's data before Ray is started: sources, tokenizer, data set, vocabulary.

Everything here only looks; nothing is written, no text is read. `raytron.data.prepare` looks again before it works.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from raytron.config import DataConfig, RunConfig, to_mapping
from raytron.data.blend_check import blend_problems, validation_problems
from raytron.data.chat import check_template, read_template
from raytron.data.corpus import resolve
from raytron.data.fast import FAST, Encoder
from raytron.data.fim import fim_problems
from raytron.data.manifest import FILE_NAME
from raytron.data.records import Fields
from raytron.data.shards import Dataset, open_dataset
from raytron.data.text_index import TextCorpus, text_folder
from raytron.data.text_sources import resolve_text
from raytron.data.tokenizer import SMALLEST_VOCAB, Tokenizer
from raytron.errors import ConfigError, DataError, Problem, RaytronError

BUILD_KEYS = (
    "sources", "format", "text_key", "messages_key", "chat_template", "metadata_keys", "on_bad_record",
    "validation_fraction", "shard_mb", "max_mb", "tokenizer",
)  # fmt: skip


def data_folder(config: RunConfig) -> Path:
    """Where the data set of a run lies, or the index of its text, whether or not it has been prepared."""
    if config.data.source == "text":
        return text_folder(config)
    return Path(config.run_dir) / "data" if config.data.dataset is None else Path(config.data.dataset)


def build_config(data: DataConfig) -> dict[str, object]:
    """The part of a configuration that decides what a prepared data set holds."""
    mapping = to_mapping(data)
    mapping["tokenizer"].pop("backend")  # every backend gives the same ids
    return {key: mapping[key] for key in BUILD_KEYS}


def fields_of(data: DataConfig) -> Fields:
    """What a build takes of each record."""
    key = {"text": data.text_key, "chat": data.messages_key, "preference": "chosen"}[data.format]
    return Fields(key, data.metadata_keys, data.on_bad_record, data.format)


def template_of(data: DataConfig) -> str | None:
    """The chat template of a build, in Jinja; None where records are text. Raises DataError where it can't be read."""
    return read_template(data.chat_template, data.tokenizer.path) if data.format != "text" else None


def data_problems(config: RunConfig) -> list[Problem]:
    """Everything that keeps a run from using its data, as far as can be told without reading text."""
    if config.data.blend:
        found, opened = blend_problems(config)
        return [*found, *validation_problems(config, opened)]
    if config.data.source == "text":
        return [*source_problems(config.data), *_vocab_problems(config), *validation_problems(config, [])]
    ready = config.data.dataset is not None or (data_folder(config) / FILE_NAME).exists()
    return [*_single_problems(config), *validation_problems(config, _opened(config) if ready else [])]


def _opened(config: RunConfig) -> list[Dataset]:
    """The data set that a run trains on; none where it can't be opened, which is told elsewhere."""
    try:
        return [open_dataset(data_folder(config))]
    except RaytronError:
        return []


def _single_problems(config: RunConfig) -> list[Problem]:
    """What keeps a run from using its one data set."""
    try:
        if config.data.dataset is not None or (data_folder(config) / FILE_NAME).exists():
            return dataset_problems(open_dataset(data_folder(config)), config)
        return [*source_problems(config.data), *_vocab_problems(config)]
    except RaytronError as error:
        return problems_of(error, "data.dataset")


def dataset_problems(dataset: Dataset, config: RunConfig) -> list[Problem]:
    """What keeps a run from using an opened data set."""
    data, digest = config.data, None
    if data.tokenizer.path is not None:
        digest = _given(data).sha256
    found = dataset.misfits(vocab=config.model.vocab, tokenizer_sha256=digest)
    if data.dataset is None:
        found += other_build(dataset, data)
    return found + fim_problems(dataset.tokenizer, data)


def text_misfits(text: TextCorpus, config: RunConfig) -> list[Problem]:
    """What keeps a run from using text that was indexed."""
    return [*text.misfits(vocab=config.model.vocab), *fim_problems(text.tokenizer, config.data)]


def other_build(dataset: Dataset, data: DataConfig) -> list[Problem]:
    """Each key in which the configuration differs from the one that the data set was prepared by."""
    now, unsaid = build_config(data), build_config(DataConfig())  # a key that came later had its default before
    then = {**unsaid, **dataset.manifest.build}
    then["tokenizer"] = {**cast(dict[str, object], unsaid["tokenizer"]), **cast(dict[str, object], then["tokenizer"])}
    return [
        Problem(f"data.{key}", f"is {now[key]!r}, but {dataset.name} was prepared with {then[key]!r}", CHANGED)
        for key in BUILD_KEYS
        if then[key] != now[key]
    ]


CHANGED = "take the old value, or another run_dir; or remove that folder"


def source_problems(data: DataConfig) -> list[Problem]:
    """What keeps text from being made into a data set, or from being read."""
    found: list[Problem] = []
    try:
        if data.source == "text":
            resolve_text(data, data.sources)
        else:
            resolve(data.sources, data.text_key, max_bytes(data), fields=fields_of(data))
    except RaytronError as error:
        found += problems_of(error, "data.sources")
    if data.tokenizer.path is None and data.tokenizer.vocab < SMALLEST_VOCAB:
        what = f"{data.tokenizer.vocab} ids have no room for 256 bytes and the end-of-document token"
        found.append(Problem("data.tokenizer.vocab", what, f"use {SMALLEST_VOCAB} or more"))
    try:
        if data.tokenizer.path is not None:
            tokenizer = _given(data)
            if data.tokenizer.backend == FAST:
                Encoder(tokenizer, FAST)
            found += fim_problems(tokenizer.path, data, data.tokenizer.pattern)
        template = template_of(data)
        if template is not None:
            check_template(template)
    except RaytronError as error:
        found += problems_of(error, "data.tokenizer.path")
    return found


def _given(data: DataConfig) -> Tokenizer:
    """The tokenizer that a path names. Raises DataError or ConfigError."""
    assert data.tokenizer.path is not None
    return Tokenizer(data.tokenizer.path, data.tokenizer.eod, data.tokenizer.pattern)


def max_bytes(data: DataConfig) -> int | None:
    """`data.max_mb` in bytes."""
    return None if data.max_mb is None else int(data.max_mb * 2**20)


def problems_of(error: RaytronError, where: str) -> list[Problem]:
    """The problems that an exception carries; one that is only text is put at `where`."""
    if isinstance(error, ConfigError):
        return list(error.problems)
    if isinstance(error, DataError) and error.args and isinstance(error.args[0], Problem):
        return [error.args[0]]
    return [Problem(where, str(error), "see above")]


def _vocab_problems(config: RunConfig) -> list[Problem]:
    """Whether the tokenizer that the data will be made with fits the model."""
    data = config.data
    if data.tokenizer.path is None:
        vocab, where = data.tokenizer.vocab, "data.tokenizer.vocab"
    else:
        try:
            vocab, where = _given(data).vocab, "data.tokenizer.path"
        except RaytronError:
            return []  # named by source_problems
    if vocab <= config.model.vocab:
        return []
    what = f"gives token ids up to {vocab - 1}, the model's go only to {config.model.vocab - 1}"
    return [Problem(where, what, f"set model.vocab to {vocab} or more")]
