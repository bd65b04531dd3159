"""Presets are legal, found by name, and named after their hardware."""

import pytest

from raytron import presets
from raytron.config import load, to_mapping
from raytron.errors import ConfigError
from raytron.rules import problems


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_legal_and_says_its_name(name):
    config = presets.find(name)
    assert problems(config) == []
    assert config.name == name
    assert config.run_dir == f"runs/{name}"
    assert load(to_mapping(config)) == config


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError) as caught:
        presets.find("llama3_8b_8xh10")
    assert caught.value.problems[0].remedy == "did you mean llama3_8b_8xh100?"
    with pytest.raises(ConfigError, match="use one of quickstart_4xcpu"):
        presets.find("?")
