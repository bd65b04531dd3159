"""A worker dies while a run reads a blend in stages: every sample once, and the end of an undisturbed run to the bit."""

from __future__ import annotations

import pytest
from fault_runs import SMALL, assert_same_end, told

from raytron.actors.run import tokenize
from raytron.config import load

pytestmark = pytest.mark.recovery
WAIT_S = 240  # of a run on a machine that has other work


@pytest.fixture(scope="module")
def blend(corpus_dataset, tmp_path_factory):
    """The data set of words and one of numbers, and other weights from the middle of step 4 on."""
    text = tmp_path_factory.mktemp("numbers")
    for number in range(24):
        (text / f"{number}.txt").write_text(" ".join(map(str, range(number, 150 + number))), encoding="utf-8")
    given = {"path": str(corpus_dataset / "tokenizer.json")}
    data = {"sources": [str(text)], "validation_fraction": 0.2, "tokenizer": given}
    folder = tmp_path_factory.mktemp("numbers-data")
    numbers = tokenize(load({**SMALL, "run_dir": str(folder), "data": data}), lambda fraction, message: None)
    return {
        "data.dataset": None,
        "data.blend": [{"dataset": str(corpus_dataset), "weight": 0.75}, {"dataset": str(numbers), "weight": 0.25}],
        "data.blend_block": 8,
        "data.stages": [{"start_sample": 14, "weights": [0.5, 0.5]}],
    }


def test_a_dead_rank_of_three_costs_no_sample_of_a_blend(begin, undisturbed, blend):
    """Three ranks share steps of four samples; the twin has two."""
    run = begin("kill rank 2 in the forward of step 4", "kill rank 0 in the optimizer of step 6", **blend,
                **{"mesh.dp": 3})  # fmt: skip
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**blend, **{"mesh.dp": 2}))
    assert story.result.restarts == 2
