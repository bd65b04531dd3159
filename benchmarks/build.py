"""Tokenization, in MB of text for each second of one CPU: python benchmarks/build.py

One task of a build (read JSONL, encode, write parts), by each backend; the library's bare `encode_batch_fast` stands beside
it in the same rounds as a peer. The text is the interpreter's standard library, then the same several times over: a
repeated text flatters a backend that remembers words. What counts is CPU time, so that other work on the machine does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from context import context, cpu_seconds, write

from raytron.data.corpus import resolve
from raytron.data.records import documents
from raytron.data.task import Job, tokenize_group
from raytron.data.tokenizer import Tokenizer, train_tokenizer

EOD = "<|endoftext|>"


def task(folder: Path, name: str, text: Path, tokenizer: Tokenizer, backend: str) -> Callable[[], Any]:
    """A build's task in a folder of its own."""
    parts = folder / name
    parts.mkdir()
    job = Job(str(parts), str(tokenizer.path), EOD, "text", 0.02, backend=backend)
    return lambda: tokenize_group(0, resolve([str(text)]).units, job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=12, help="MiB of the standard library")
    parser.add_argument("--times", type=int, default=8, help="how often, where it is repeated")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    units = resolve(["python-stdlib"], max_bytes=int(given.mb * 2**20)).units
    texts = [text for unit in units for text in documents(unit, "text")]
    size = sum(len(text.encode()) for text in texts) / 1e6
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_tokenizer(folder / "tokenizer.json", texts[::4], 8192, EOD)
        for times in (1, given.times):
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (folder / f"{times}.jsonl").write_text("".join(lines * times))
        for number in range(given.rounds):
            cases = {
                "library alone": (1, lambda: tokenizer.codec.encode_batch(texts)),
                "task, tokenizers": (1, task(folder, f"a{number}", folder / "1.jsonl", tokenizer, "tokenizers")),
                "task, gigatoken": (1, task(folder, f"b{number}", folder / "1.jsonl", tokenizer, "gigatoken")),
                f"task, gigatoken, text {given.times} times": (
                    given.times,
                    task(folder, f"c{number}", folder / f"{given.times}.jsonl", tokenizer, "gigatoken"),
                ),
            }
            for case, (times, action) in cases.items():
                rates.setdefault(case, []).append(times * size / cpu_seconds(action))
    medians = {case: round(statistics.median(found), 1) for case, found in rates.items()}
    facts = context(rounds=given.rounds, text_mb=round(size, 1), documents=len(texts), vocabulary=tokenizer.vocab)
    write("build", {"context": facts, "median_mb_per_cpu_s": medians})


if __name__ == "__main__":
    main()
