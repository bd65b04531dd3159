"""The memory of a build: of a task and of joining its parts, whatever the size of the files."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

MIB = 2**20
BUILD = """
import re, sys
from pathlib import Path
import raytron.data.prepare
from raytron.data.compact import compact
from raytron.data.corpus import resolve
from raytron.data.task import Job, tokenize_group
from raytron.data.tokenizer import Tokenizer

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


source, folder = sys.argv[1:]
before = peak()
tokenizer = Tokenizer("byte", "<|endoftext|>").save(Path(folder) / "tokenizer.json")
job = Job(folder, str(tokenizer.path), "<|endoftext|>", "text", 0.3, part_tokens=2**26)
parts = tokenize_group(0, resolve([source]).units, job)[0].parts
entries = compact(Path(folder), parts, 2**27, 0.3)
print(sum(entry.tokens for entry in entries), before, peak())
"""


def a_line(length: int) -> bytes:
    return b"so it goes, " * (length // 12)


def write(path: Path, block: bytes, size: int) -> int:
    """A file of about `size` bytes; exactly how many."""
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    return size // len(block) * len(block)


def text(folder: Path) -> tuple[Path, int]:
    return folder / "a.txt", write(folder / "a.txt", a_line(4000) + b"\n", 300 * MIB)


def text_of_one_line(folder: Path) -> tuple[Path, int]:
    return folder / "a.txt", write(folder / "a.txt", "äöü€😀".encode() * 1000, 300 * MIB)


def packed_lines(folder: Path) -> tuple[Path, int]:
    path = folder / "a.jsonl.gz"
    line = json.dumps({"text": a_line(4000).decode()}).encode() + b"\n"
    block = gzip.compress(line * 1000, 1)
    return path, write(path, block, 80 * len(block)) // len(block) * 1000 * len(a_line(4000))


def giant_records(folder: Path) -> tuple[Path, int]:
    path, words = folder / "a.jsonl", a_line(60 * MIB).decode() + "😀"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(3):
            file.write(json.dumps({"text": words}, ensure_ascii=False) + "\n")
    return path, 3 * len(words.encode())


def one_record_batch(folder: Path) -> tuple[Path, int]:
    path, rows, words = folder / "a.arrow", 75_000, a_line(4000).decode()
    table = pa.record_batch({"text": pa.array([words] * rows, pa.large_string())})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch(table)
    return path, rows * len(words)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, where Linux tells a peak")
@pytest.mark.parametrize(
    "make",
    [
        text,
        giant_records,
        *(pytest.param(make, marks=pytest.mark.slow) for make in (text_of_one_line, packed_lines, one_record_batch)),
    ],
)
def test_a_build_stays_below_a_gigabyte(tmp_path: Path, make: object) -> None:
    path, size = make(tmp_path)  # type: ignore[operator]
    (tmp_path / "parts").mkdir()
    run = [sys.executable, "-c", BUILD, str(path), str(tmp_path / "parts")]
    tokens, before, peak = map(int, subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    print(f"{make.__name__}: {size / MIB:.0f} MiB of text, {before} MiB before, {peak} MiB at most")  # type: ignore[attr-defined]
    assert size <= tokens <= size * 1.01
    assert peak < 1000
