"""Whatever stands in a configuration file or an override: a RunConfig or a ConfigError, soon and without much memory."""

from __future__ import annotations

import contextlib
import itertools
import resource
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from raytron.config import RunConfig, load, to_yaml
from raytron.errors import ConfigError

LETTERS = "abcdefghi"
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{inner}'] * 9)}]\n" for inner, name in itertools.pairwise(LETTERS)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join([f'*{inner}'] * 9)}]}}\n" for inner, name in itertools.pairwise(LETTERS)
)
HOSTILE = {
    "aliases of aliases": LAUGHS + "steps: *i\n",
    "merged aliases": MERGES,
    "a mapping in itself": "model: &a\n  layers: *a\n",
    "a list in itself": "data:\n  sources: &a [*a]\n",
    "deep lists": "[" * 5000,
    "deep mappings": "{a: " * 3000,
    "a long number": "steps: " + "1" * 6000,
    "a long hexadecimal number": "steps: 0x" + "f" * 6000,
    "more than a float": "steps: 1e999",
    "no date": "steps: 2001-99-99",
    "no timestamp": "steps: !!timestamp abc",
    "no boolean": "steps: !!bool abc",
    "an empty integer": "steps: !!int ''",
    "a call": "steps: !!python/object/apply:os.system [ls]",
    "a list as a key": "[1, 2]: 3",
    "a long file": "name: " + "x" * 1_000_000,
    "many keys": "".join(f"k{number}: 1\n" for number in range(9000)),
    "a control character": "name: \x00",
}
PIECES = st.sampled_from([
    "steps", "model", "layers", "data", "sources", "mesh", "tp", ": ", ":\n  ", "\n", "- ", "[", "]", "{", "}", ", ", "&a ",
    "*a", "<<", "!!int ", "!!set ", "!!binary ", "null", "true", "1", "-1", "1e9", ".inf", ".nan", "'", '"', "|\n", "? ",
    "#", "---\n", "0x1F", "1:30", "2001-01-01", "\t", "%", "é", "\u2028",
])  # fmt: skip


def read(path: Path, text: str) -> RunConfig | None:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        return load(path)
    except ConfigError:
        return None


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_soon(tmp_path, name):
    begin = time.process_time()
    assert read(tmp_path / "run.yaml", HOSTILE[name]) is None
    assert time.process_time() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB


def test_a_file_without_end_is_refused():
    with pytest.raises(ConfigError, match="longer than"):
        load("/dev/zero")


@pytest.mark.parametrize("value", ["[" * 5000, "1" * 6000, "2001-99-99", "!!bool abc", "&a [*a]", "1e999", "{a: 1}"])
def test_hostile_overrides_are_refused(value):
    with pytest.raises(ConfigError):
        load({}, [f"mesh.tp={value}"])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=30).map("".join))
@example("a: &a [*a]")
@example("? ? ?")
def test_any_text_gives_a_configuration_or_its_problems(tmp_path, text):
    read(tmp_path / "run.yaml", text)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_whole_file_with_a_few_changes(tmp_path, data):
    text = to_yaml(RunConfig())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(at, min(len(text), at + 20)))
        text = text[:at] + data.draw(PIECES) + text[end:]
    read(tmp_path / "run.yaml", text)


@settings(max_examples=100)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_any_override(text):
    with contextlib.suppress(ConfigError):
        load({}, [text])
