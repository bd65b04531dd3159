"""One sample, told from its id to its documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from making import make_dataset

from raytron.cli import main
from raytron.config import load, to_yaml
from raytron.data.order import sample_index
from raytron.data.run_data import open_run_data
from raytron.data.sample_page import describe_sample
from raytron.errors import DataError

LENGTH = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards; documents of 5, 20 and 8 tokens in the first."""
    shards = [[[1] * 4 + [0], [2] * 19 + [0], [3] * 7 + [0]], [[4] * 30 + [0]]]
    return make_dataset(tmp_path / "tokens", shards).path


def test_a_sample_of_a_data_set_says_shard_offset_and_documents(folder: Path) -> None:
    order = sample_index(3, 0, np.arange(7), 7)
    page = describe_sample(folder, int(np.flatnonzero(order == 0)[0]), LENGTH, 3)
    assert "epoch       0 of it, from 0: its sample 0 of 7" in page
    assert "shard       train-00000.arrow, tokens 0 to 7 of 33" in page
    assert "documents   2: 0 to 1 of the shard's 3" in page
    assert "├────┤───" in page
    assert "       0 to 4        document 0, id 0000000000000000\n" in page
    assert "       5 to 7        document 1, id 0000000000000001, goes on for 17 tokens" in page
    later = describe_sample(folder, 7 + int(np.flatnonzero(sample_index(3, 1, np.arange(7), 7) == 3)[0]), LENGTH, 3)
    assert "epoch       1 of it" in later
    assert "document 1, id 0000000000000001, begins 19 tokens before it" in later
    other = describe_sample(folder, int(np.flatnonzero(order == 5)[0]), LENGTH, 3)
    assert "shard       train-00001.arrow, tokens 8 to 15 of 31" in other


def test_a_sample_of_a_run_says_its_step_and_its_source(folder: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", [[[9] * 40]]).path
    blend = [{"dataset": str(folder), "weight": 0.75}, {"dataset": str(other), "weight": 0.25}]
    config = load({"data": {"blend": blend}, "sequence_length": LENGTH, "global_batch_size": 4, "seed": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    batch = open_run_data(config, "unused").train().batch(0, 40)
    for sample in (0, 17, 39):
        page = describe_sample(tmp_path / "run", sample)
        name = "1 other" if (batch.tokens[sample] == 9).all() else "0 tokens"
        assert f"sample {sample}, of step {sample // 4 + 1}\n" in page
        assert f"source      {name}, " in page


def test_the_command_shows_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--sample", "2", "--sequence-length", "8"]) == 0
    assert "sample 2\n" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--sample", "2"]) == 1
    assert "give their length in tokens" in capsys.readouterr().err


def test_what_there_is_not_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no sample -1"):
        describe_sample(folder, -1, LENGTH)
    with pytest.raises(DataError, match="one sample needs 101"):
        describe_sample(folder, 1, 100)
    (tmp_path / "config.yaml").write_text(to_yaml(load({"data": {"dataset": str(folder)}})))
    with pytest.raises(DataError, match="says how long samples are"):
        describe_sample(tmp_path, 1, LENGTH)
