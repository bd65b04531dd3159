"""What the README shows of plans is what the command says today."""

import re
from pathlib import Path

import pytest

from raytron import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^\$ raytron plan (.+)\n((?:(?!\$ |```).*\n)+)", README, flags=re.MULTILINE)


def test_some_are_shown():
    assert len(SHOWN) == 3


@pytest.mark.parametrize(("arguments", "page"), SHOWN, ids=[arguments for arguments, _ in SHOWN])
def test_a_page_is_what_the_command_says(arguments, page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    cli.main(["plan", *arguments.split()])
    out = capsys.readouterr()
    assert (out.out + out.err).strip() == page.strip()


def test_the_memory_of_the_quickstart_is_what_its_plan_says(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    cli.main(["plan", "examples/quickstart.yaml"])
    said = capsys.readouterr().out
    table = said[said.index("memory  ") : said.index("work  ")]
    assert table in README
