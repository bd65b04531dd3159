"""What a comparison with the twin says when it fails."""

import math

import torch
from harness import Outcome, differences


def outcome(gradients, losses):
    return Outcome({name: torch.tensor(values) for name, values in gradients.items()}, 5.0, losses, {})


def test_all_that_is_further_off_is_named_with_its_relative_difference():
    truth = outcome({"head": [3.0, 4.0], "norm": [1.0, 0.0], "bias": [0.0]}, [2.0, 1.0])
    assert differences(truth, truth) == []
    near = outcome({"head": [3.0, 4.00004], "norm": [1.0, 0.0], "bias": [0.0]}, [2.000001, 1.000009])
    assert differences(near, truth) == []
    off = outcome({"head": [3.0, 4.5], "norm": [1.0, 0.0], "bias": [0.25]}, [2.0001, math.nan])
    assert [line.strip() for line in differences(off, truth)] == [
        "gradient of head: 1.00e-01, limit 1e-05",
        "gradient of bias: 2.50e-01, limit 1e-05",
        "loss of step 1: 5.00e-05, limit 1e-06",
        "loss of step 2: nan, limit 1e-05",
    ]
