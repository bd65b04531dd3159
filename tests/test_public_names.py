"""The public names: which there are, where they live, and that they cost nothing until they are used."""

import subprocess
import sys
from importlib import import_module

import pytest

import raytron

CORE = {"RunConfig", "load", "make_plan", "train", "launch", "attach", "Run", "Result", "RaytronError", "ConfigError"}


@pytest.mark.parametrize("name", raytron.__all__)
def test_a_public_name_is_what_its_module_holds(name):
    assert getattr(raytron, name) is getattr(import_module(raytron._HOME[name]), name)


def test_the_lists_of_names_agree():
    assert sorted(raytron._HOME) == raytron.__all__
    assert set(raytron.__all__) <= set(dir(raytron))
    assert set(raytron.__all__) >= CORE


@pytest.mark.parametrize("module", ["raytron.config", "raytron.errors"])
def test_every_section_of_a_configuration_and_every_error_is_public(module):
    found = import_module(module)
    own = {
        name
        for name, value in vars(found).items()
        if isinstance(value, type) and value.__module__ == module and not name.startswith("_")
    }
    assert own <= set(raytron.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'raytron' has no attribute 'tarin'"):
        raytron.tarin  # noqa: B018


def test_planning_from_python_loads_neither_torch_nor_ray():
    code = (
        "import sys, raytron\n"
        "assert not {'yaml', 'torch', 'ray'} & set(sys.modules)\n"
        "print(raytron.make_plan(raytron.RunConfig(), None))\n"
        "assert not {'torch', 'ray'} & set(sys.modules)\n"
        "assert raytron.__version__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
