"""What it costs to tokenize text as it is read: python benchmarks/text.py

The corpus is the interpreter's own standard library and its packages, as JSONL, a document a file, at most 16 MiB. Rates are
of CPU time of this process, the best of three rounds: the pass that indexes all of it, and samples of it in batches
of 8 in shuffled order (`benchmarks/data.py` reads a tokenized data set). `fill` and `cut` are of every sample of an epoch.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from context import context, cpu_seconds, python_files, write

from raytron.config import RunConfig, load
from raytron.data.batch import TokenStream
from raytron.data.ensure import ensure_data
from raytron.data.estimate import Estimate
from raytron.data.run_data import open_run_data
from raytron.data.text_build import TextJob, index_group
from raytron.data.text_index import TextCorpus, text_folder
from raytron.data.text_reader import TextReader, fullness
from raytron.data.text_sources import resolve_text, rule_of
from raytron.data.tokenizer import Tokenizer

MIB = 2**20
TEXT_MIB, READ = 16, 128  # text of the corpus, samples that are read
LENGTHS = (512, 2048, 8192)


def make_corpus(path: Path) -> int:
    """Its bytes of text."""
    size = 0
    with path.open("w") as file:
        for text in python_files(TEXT_MIB * MIB):
            size += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
    return size


def rate(stream: TokenStream) -> int:
    """Tokens that count, of each second of CPU time."""

    def read() -> int:
        return int(sum(stream.batch(first, 8).weights.sum() for first in range(0, READ, 8)))

    return round(read() / cpu_seconds(read, 3))


def one(config: RunConfig) -> dict[str, Any]:
    data = open_run_data(config, ensure_data(config))
    text = data.sources[0]
    assert isinstance(text, TextCorpus)
    reader = TextReader(text, "train")
    fill, cut = fullness(reader, range(reader.size))
    return {
        "samples": reader.size,
        "backend": text.manifest.backend,
        "bytes_per_token": round(text.manifest.mean, 3),
        "cut_for_percent": round(100 * text.manifest.fill_for),
        "fill_percent": round(100 * fill, 2),
        "cut_percent": round(100 * cut, 3),
        "tokens_per_cpu_s": rate(data.train()),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        size = make_corpus(Path(scratch) / "corpus.jsonl")
        shared = {
            "source": "text",
            "sources": [f"{scratch}/corpus.jsonl"],
            "tokenizer": {"vocab": 16_000, "train_mb": 4},
        }
        base = load(
            {"model": {"vocab": 16_000}, "sequence_length": 2048, "run_dir": f"{scratch}/first", "data": shared}
        )
        ensure_data(base)
        path = str(text_folder(base) / "tokenizer.json")
        given = {"data.tokenizer.path": path, "data.tokenizer.vocab": 4096, "data.tokenizer.train_mb": 8.0}
        base = base.replace(**given, **{"run_dir": f"{scratch}/index"})

        units, folder = resolve_text(base.data, base.data.sources).units, Path(scratch) / "parts"
        folder.mkdir()
        rule = rule_of(base, Tokenizer(path, base.data.tokenizer.eod))
        job = TextJob(str(folder), rule, Estimate.even(250), 0.9)
        indexing = cpu_seconds(lambda: index_group(0, 0, units, job), 3)
        parts = sum(path.stat().st_size for path in folder.glob("*.arrow"))
        texts = {str(n): one(base.replace(sequence_length=n, run_dir=f"{scratch}/{n}")) for n in LENGTHS}
        index_facts = {
            "mib_per_cpu_s": round(size / MIB / indexing, 1),
            "percent_of_text": round(100 * parts / size, 2),
        }
    facts = {"context": context(numpy=np.__version__, text_mib=round(size / MIB, 1)), "index": index_facts}
    write("text", {**facts, "samples": texts})


if __name__ == "__main__":
    main()
