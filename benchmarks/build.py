"""Tokenization, in MB of text for each second of one CPU: python benchmarks/build.py

One task of a build (read JSONL, encode, write parts), by each backend. Peers in the same rounds: the library's bare
`encode_batch_fast`, and Megatron's way, where megatron-core is installed: a document a call, into its IndexedDatasetBuilder.
The text is Python: the interpreter's standard library and its packages; slow readers are given every tenth document of it.
What counts is CPU time, so that other work on the machine does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from context import context, cpu_seconds, python_files, write

from raytron.data.corpus import resolve
from raytron.data.task import Job, tokenize_group
from raytron.data.tokenizer import Tokenizer, train_tokenizer

EOD = "<|endoftext|>"
FEWER = 10  # slow readers are given every so many-th document


def megatron(folder: Path, texts: Sequence[str], tokenizer: Tokenizer) -> Callable[[], Any] | None:
    """As its preprocess_data.py does; None where it is not installed."""
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    except ImportError:
        return None
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(str(tokenizer.path))

    def build() -> None:
        out = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=np.uint16)
        for text in texts:
            ids = [*encoder.encode(text).ids, tokenizer.eod]
            out.add_document(torch.tensor(ids), [len(ids)])
        out.finalize(str(folder / "megatron.idx"))

    return build


def task(folder: Path, name: str, text: Path, tokenizer: Tokenizer, backend: str) -> Callable[[], Any]:
    """A build's task in a folder of its own."""
    parts = folder / name
    parts.mkdir()
    job = Job(str(parts), str(tokenizer.path), EOD, "text", 0.02, backend=backend)
    return lambda: tokenize_group(0, resolve([str(text)]).units, job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=64, help="MiB of text")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    texts = list(python_files(int(given.mb * 2**20)))
    few = texts[::FEWER]
    sizes = {len(each): sum(len(text.encode()) for text in each) / 1e6 for each in (texts, few)}
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_tokenizer(folder / "tokenizer.json", few, 32_000, EOD)
        for part in (texts, few):
            (folder / f"{len(part)}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        theirs = megatron(folder, few, tokenizer)
        for number in range(given.rounds):
            cases = {
                "library alone": (few, lambda: tokenizer.codec.encode_batch(few)),
                "task, tokenizers": (
                    few,
                    task(folder, f"a{number}", folder / f"{len(few)}.jsonl", tokenizer, "tokenizers"),
                ),
                "task, gigatoken": (
                    texts,
                    task(folder, f"b{number}", folder / f"{len(texts)}.jsonl", tokenizer, "gigatoken"),
                ),
            } | ({} if theirs is None else {"Megatron's way": (few, theirs)})
            for case, (part, action) in cases.items():
                rates.setdefault(case, []).append(sizes[len(part)] / cpu_seconds(action))
    medians = {case: round(statistics.median(found), 2) for case, found in rates.items()}
    ratios = {case: round(medians["task, gigatoken"] / found, 1) for case, found in medians.items()}
    facts = context(
        rounds=given.rounds, text_mb=round(sizes[len(texts)], 1), documents=len(texts), vocabulary=tokenizer.vocab
    )
    write("build", {"context": facts, "median_mb_per_cpu_s": medians, "gigatoken_by_each": ratios})


if __name__ == "__main__":
    main()
