"""A build that is stopped goes on where it was, and gives the very bytes that an undisturbed one gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raytron.config import DataConfig, TokenizerConfig
from raytron.data import prepare as prepare_module
from raytron.data import tokenize
from raytron.data.prepare import prepare
from raytron.data.shards import open_dataset

GROUP_BYTES = 2**16
DRIVER = f"""
import sys, ray
from raytron.config import DataConfig, TokenizerConfig
from raytron.data import tokenize
from raytron.data.prepare import prepare
tokenize.SMALLEST_GROUP_BYTES = {GROUP_BYTES}
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
text, folder = sys.argv[1:]
prepare(DataConfig(sources=(text,), validation_fraction=0.1, shard_mb=1.0, tokenizer=TokenizerConfig(
    vocab=300, train_mb=0.2, backend="tokenizers")), folder, lambda share, message: print(message, flush=True))
"""


def write_text(folder: Path, files: int, lines: int) -> None:
    """Files of different documents, deterministic."""
    folder.mkdir()
    for n in range(files):
        words = (f"{(n * 7919 + line * 104729) % 99991} so it goes, said file {n}" for line in range(lines))
        (folder / f"{n:02d}.txt").write_text("\n".join(words))


def config(text: Path) -> DataConfig:
    tokenizer = TokenizerConfig(vocab=300, train_mb=0.2, backend="tokenizers")
    return DataConfig(sources=(str(text),), validation_fraction=0.1, shard_mb=1.0, tokenizer=tokenizer)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def told(data: DataConfig, folder: Path) -> list[str]:
    """What a build says."""
    messages: list[str] = []
    prepare(data, folder, lambda share, message: messages.append(message))
    return messages


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "SMALLEST_GROUP_BYTES", GROUP_BYTES)


@pytest.mark.recovery
def test_a_killed_build_goes_on_and_gives_the_same_bytes(local_ray: None, small_groups: None, tmp_path: Path) -> None:
    write_text(tmp_path / "text", files=24, lines=5000)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "text"), str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    seen = 0
    for line in driver.stdout:
        seen += line.startswith("tokenized ")
        if seen == 3:
            break
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    receipts = settled(tmp_path / "killed" / "parts")
    assert len(receipts) >= 3
    assert not (tmp_path / "killed" / "manifest.json").exists()
    tokenizer = (tmp_path / "killed" / "tokenizer.json").stat().st_mtime_ns

    messages = told(config(tmp_path / "text"), tmp_path / "killed")
    assert kept(messages) == len(receipts) < sum(message.startswith("tokenized") for message in messages)
    assert (tmp_path / "killed" / "tokenizer.json").stat().st_mtime_ns == tokenizer
    prepare(config(tmp_path / "text"), tmp_path / "undisturbed")
    assert len(open_dataset(tmp_path / "killed").manifest.shards) > 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    open_dataset(tmp_path / "killed").verify()


def settled(parts: Path) -> list[str]:
    """The receipts that there are when no task of a dead driver writes any more."""
    before, since = None, time.monotonic()
    while time.monotonic() - since < 2:
        now = {path.name: path.stat().st_size for path in parts.iterdir() if path.suffix != ".tmp"}
        if now != before:
            before, since = now, time.monotonic()
        time.sleep(0.1)
    return [name for name in before or {} if name[0].isdigit() and name.endswith(".json")]


@pytest.fixture
def stopped(
    local_ray: None, small_groups: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[DataConfig, Path]:
    """A build that was stopped when its tasks were done, before their parts were joined."""
    write_text(tmp_path / "text", files=6, lines=2500)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "compact", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(tmp_path / "text"), tmp_path / "data")
    return config(tmp_path / "text"), tmp_path / "data"


def kept(messages: list[str]) -> int:
    return sum(message.startswith("tokenized before") for message in messages)


def test_nothing_is_done_again_where_parts_were_being_joined(stopped: tuple[DataConfig, Path], tmp_path: Path) -> None:
    data, folder = stopped
    (folder / "train-00000.arrow").write_text("half a shard")
    (folder / ".train-00001.arrow.1.tmp").write_text("half a shard")
    (folder / "parts" / ".000000-train.1.spool").write_text("half a part")
    messages = told(data, folder)
    assert kept(messages) == 6
    assert not any(message.startswith(("training", "encoding")) for message in messages)
    assert kept(told(data, tmp_path / "again")) == 0
    assert contents(folder) == contents(tmp_path / "again")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "receipt"])
def test_a_damaged_part_is_made_again(stopped: tuple[DataConfig, Path], tmp_path: Path, damage: str) -> None:
    data, folder = stopped
    part = folder / "parts" / "000002-train-000.arrow"
    content = bytearray(part.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif damage == "cut":
        part.write_bytes(content[:-8])
    elif damage == "remove":
        part.unlink()
    else:
        (folder / "parts" / "000002.json").write_text("{")
    assert kept(told(data, folder)) == 5
    prepare(data, tmp_path / "again")
    assert contents(folder) == contents(tmp_path / "again")


def test_another_configuration_or_corpus_begins_anew(stopped: tuple[DataConfig, Path], tmp_path: Path) -> None:
    data, folder = stopped
    (tmp_path / "text" / "03.txt").write_text("something else")
    assert kept(told(data, folder)) == 0
    assert open_dataset(folder).manifest.build["validation_fraction"] == 0.1


def test_another_fraction_begins_anew(stopped: tuple[DataConfig, Path]) -> None:
    data, folder = stopped
    assert kept(told(replace(data, validation_fraction=0.3), folder)) == 0


def test_another_backend_goes_on(stopped: tuple[DataConfig, Path]) -> None:
    data, folder = stopped
    assert kept(told(replace(data, tokenizer=replace(data.tokenizer, backend="auto")), folder)) == 6
