import pytest

from raytron.testing.faults import Fault


def test_a_sentence_says_who_what_and_where():
    fault = Fault.parse("fill the disk of rank 12 in the write of step 40")
    assert fault == ("fill the disk of", 12, "write", 40, False)
    assert str(fault) == "fill the disk of rank 12 in the write of step 40"
    assert Fault.parse("slow rank 0 in every forward").step is None
    assert str(Fault.parse("kill rank 0 in the load")) == "kill rank 0 in the load"


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
