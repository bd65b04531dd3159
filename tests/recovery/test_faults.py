import pytest

from raytron.testing.faults import Fault
from raytron.testing.soak import draw


def test_a_sentence_says_who_what_and_where():
    fault = Fault.parse("fill the disk of rank 12 in the write of step 40")
    assert fault == ("fill the disk of", 12, "write", 40, False, 1)
    assert Fault.parse("kill rank 1 in the second build").passing == 2
    assert str(fault) == "fill the disk of rank 12 in the write of step 40"
    assert Fault.parse("slow rank 0 in every forward").step is None
    for sentence in (
        "kill rank 0 in the load",
        "kill rank 1 in the second build",
        "poison rank 1 in every forward of step 3",
    ):
        assert str(Fault.parse(sentence)) == sentence


def test_a_soak_can_be_had_again():
    assert draw(50, seed=3) == draw(50, seed=3) != draw(50, seed=4)
    for _, sentences in draw(50, seed=3):
        assert [str(Fault.parse(sentence)) for sentence in sentences] == sentences


@pytest.mark.parametrize(
    "sentence",
    [
        "kill rank 1",
        "kill rank 1 in the shower of step 3",
        "kill rank 1 in the forward",
        "kill rank 1 in the load of step 2",
    ],
)
def test_what_is_no_such_sentence_is_refused(sentence):
    with pytest.raises(ValueError, match="rank 1"):
        Fault.parse(sentence)
