"""One rank of a node reads for others, and one of them dies: whoever is left waits for nobody."""

from __future__ import annotations

from itertools import pairwise

import pytest
from fault_runs import assert_same_end, told

pytestmark = [pytest.mark.recovery, pytest.mark.slow]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_who_reads_dies_and_then_who_does_not(begin, undisturbed, tmp_path_factory, prefetch):
    texts = tmp_path_factory.mktemp("texts")
    for number in range(24):
        (texts / f"{number}.txt").write_text(f"document {number}\n" + "a quick brown fox; " * (9 * (number % 5 + 3)))
    changes = {
        "mesh.pp": 2, "steps": 9, "data.dataset": None, "data.source": "text", "data.sources": [str(texts)],
        "data.tokenizer.vocab": 300, "data.validation_fraction": 0.2, "data.prefetch": prefetch,
    }  # fmt: skip
    run = begin(
        "kill rank 0 in the forward of step 3",
        "kill rank 1 in the forward of step 5",
        "kill rank 0 in the optimizer of step 7",
        **changes,
    )
    story = told(run, run.wait(timeout_s=150))
    assert_same_end(story, undisturbed(**changes))
    assert [event["ranks"] for event in story.all("lost")] == [[0], [1], [0]]
    pids = [event["pids"] for event in story.all("workers")]
    kept = [before[rank] == after[rank] for (before, after), rank in zip(pairwise(pids), "101", strict=True)]
    assert kept == [True] * 3, "who is left stays"
