"""Micro-batches on data-parallel ranks: each once, in order, as equal as can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.config import RunConfig
from raytron.deal import Deal


@given(st.integers(1, 300), st.integers(1, 40))
def test_each_is_dealt_once_in_order(count, ranks):
    deal = Deal(count, ranks)
    hands = [deal.of(rank) for rank in range(ranks)]
    assert [number for hand in hands for number in hand] == list(range(count))
    sizes = [len(hand) for hand in hands]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert (deal.most, deal.fewest) == (sizes[0], sizes[-1])


def test_it_prints_itself():
    assert str(Deal(8, 4)) == "2 on each of 4"
    assert str(Deal(7, 3)) == "3 on 1 and 2 on 2 of 3"


def test_a_rank_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no rank 3 of 3"):
        Deal(7, 3).of(3)


MIXTURE = {"model.experts.count": 8, "mesh.dp": 3}


@pytest.mark.parametrize(
    ("changes", "together"),
    [
        ({"mesh.dp": 3}, False),
        ({"mesh.dp": 3, "data_parallel.zero": 2}, True),
        ({"mesh.dp": 3, "data_parallel.zero": 2, "determinism": "canonical"}, False),
        ({"mesh.dp": 3, "data_parallel.zero": 3, "determinism": "canonical"}, True),
        ({"mesh.dp": 3, "mesh.replicate": 3, "data_parallel.zero": 3}, False),
        ({"mesh.dp": 1, "mesh.cp": 2, "data_parallel.zero": 3}, False),
        (MIXTURE, False),
        ({**MIXTURE, "mesh.tp": 2, "mesh.ep": 2}, False),
        ({**MIXTURE, "mesh.tp": 2, "mesh.ep": 2, "mesh.etp": 3}, True),
        ({**MIXTURE, "mesh.dp": 4, "mesh.ep": 2}, True),
    ],
    ids=str,
)
def test_ranks_that_talk_within_a_micro_batch_run_equally_many(changes, together):
    config = RunConfig().replace(global_batch_size=7, **changes)
    assert config.lockstep == together
    run = [config.microbatches_run(rank) for rank in range(config.mesh.dp)]
    assert (run[0] == run[-1]) == (together or 7 % config.mesh.dp == 0)
