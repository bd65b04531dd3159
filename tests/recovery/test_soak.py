"""Fifty random faults in one run."""

from __future__ import annotations

import pytest

from raytron.testing.soak import soak

pytestmark = [pytest.mark.recovery, pytest.mark.slow]


def test_after_fifty_random_faults_a_run_ends_as_an_undisturbed_one(local_ray, tmp_path):
    outcome = soak(50, seed=0, folder=tmp_path)
    assert not outcome["missed"]
    assert not outcome["differs"]
