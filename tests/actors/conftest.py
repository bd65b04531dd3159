"""One small data set for all tests of this folder."""

from __future__ import annotations

import pytest
from tiny_run import TINY

from raytron.config import load

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(24):
        (folder / f"{number}.txt").write_text(f"document {number}\n" + TEXT * (number % 5 + 3), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def dataset(local_ray, corpus, tmp_path_factory):
    """The corpus, tokenized once."""
    from raytron.actors.run import tokenize

    folder = tmp_path_factory.mktemp("prepared")
    data = {"sources": [str(corpus)], "validation_fraction": 0.2, "tokenizer": {"vocab": 300}}
    return tokenize(load({**TINY, "run_dir": str(folder), "data": data}), lambda fraction, message: None)


@pytest.fixture
def config(dataset, tmp_path):
    """A run of two pipeline stages that takes a second."""
    name = tmp_path.name.replace("_", "-")
    return load({**TINY, "name": name, "run_dir": str(tmp_path / "run"), "data": {"dataset": str(dataset)}})
