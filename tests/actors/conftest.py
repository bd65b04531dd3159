"""One local Ray, and one small data set, for all tests of this folder."""

from __future__ import annotations

import logging

import pytest
import ray

from raytron.config import load

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n"
TINY = {
    "steps": 6,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "sequence_length": 16,
    "model": {"layers": 2, "hidden": 32, "heads": 2, "ffn": 48, "vocab": 300},
    "mesh": {"pp": 2},
    "checkpoint": {"every": 2},
    "evaluate": {"batches": 1},
    "cluster": {"cpus_per_worker": 0.5, "timeout_s": 30, "device": "cpu"},
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(24):
        (folder / f"{number}.txt").write_text(f"document {number}\n" + TEXT * (number % 5 + 3), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def local_ray():
    """A Ray of these tests' own, with room for a few workers."""
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"worker_niceness": 0, "preload_python_modules": ["torch"]},
    )
    yield
    ray.shutdown()


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
