"""The page on data says what is so: its code runs, and its configurations have no problem among their values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from making import counting, make_dataset

from raytron.config import RunConfig, load
from raytron.rules import problems

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_configurations_are_right(block: str) -> None:
    config = load(yaml.safe_load(block))
    assert problems(config) == []
    assert config != RunConfig()


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "tokens", counting([9, 12, 30, 4, 6, 17, 21, 5, 3]))
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "docs/data.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(4, 16) (4, 16)\n[0 ")
