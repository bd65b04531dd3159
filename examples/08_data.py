"""Two corpora, blended by weight, packed without cutting documents, and one batch drawn with its documents.

Run: python examples/08_data.py
"""

import tempfile
from pathlib import Path

import numpy as np

import raytron
from raytron.actors.run import tokenize
from raytron.data.batch import Batch
from raytron.data.describe import describe
from raytron.data.ensure import ensure_data
from raytron.data.run_data import open_run_data
from raytron.data.sample_page import describe_sample


def write_text(folder: Path) -> None:
    """Forty rhymes and forty times tables."""
    for kind in ("rhymes", "tables"):
        (folder / kind).mkdir(parents=True)
    for n in range(1, 41):
        rhyme = [f"{k} green bottles hanging on the wall, and if one should fall:" for k in range(n % 9 + 2, 0, -1)]
        (folder / "rhymes" / f"{n:02d}.txt").write_text("\n".join(rhyme))
        table = [f"{n} times {k} is {n * k}." for k in range(1, n % 13 + 5)]
        (folder / "tables" / f"{n:02d}.txt").write_text("\n".join(table))


def prepare(scratch: Path, kind: str, tokenizer: Path | None = None) -> Path:
    """One of them as Arrow shards; the second by the first one's tokenizer."""
    given = {"vocab": 400, "train_mb": 1} if tokenizer is None else {"path": str(tokenizer)}
    data = {"sources": [f"{scratch}/text/{kind}"], "validation_fraction": 0.1, "tokenizer": given}
    config = raytron.load({"run_dir": str(scratch / kind), "model": {"vocab": 400}, "data": data})
    return tokenize(config, lambda fraction, message: print(f"{fraction:4.0%} {message}"))


def draw(batch: Batch) -> str:
    """A line for each sample: a letter for each document, a dot where a label counts for nothing."""
    assert batch.documents is not None
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return "\n".join(
        f"{number:6d} │" + "".join(letters[document % 26] if weight else "·" for document, weight in row) + "│"
        for number, row in (
            (number, zip(documents, weights, strict=True))
            for number, documents, weights in zip(batch.ids, np.asarray(batch.documents), batch.weights, strict=True)
        )
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_text(scratch / "text")
        rhymes = prepare(scratch, "rhymes")
        tables = prepare(scratch, "tables", rhymes / "tokenizer.json")
        print(describe(rhymes, verify=True))

        blend = [{"dataset": str(rhymes), "weight": 0.75}, {"dataset": str(tables), "weight": 0.25}]
        config = raytron.load({
            "run_dir": str(scratch / "run"), "model": {"vocab": 400}, "sequence_length": 96, "global_batch_size": 8,
            "data": {"blend": blend, "blend_block": 8, "packing": "best_fit"},
        })  # fmt: skip
        data = open_run_data(config, ensure_data(config))  # which also makes the pack plans
        batch = data.train().batch(first=0, count=8)
        print("\nthe samples of the first step, a letter for each document, a dot where nothing counts:")
        print(draw(batch))

        (scratch / "run").mkdir(exist_ok=True)
        (scratch / "run" / "config.yaml").write_text(raytron.config.to_yaml(config))
        print("\n" + describe_sample(scratch / "run", sample=3))  # raytron inspect RUN_DIR --sample 3


if __name__ == "__main__":
    main()
