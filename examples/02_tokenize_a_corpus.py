"""From a folder of text to batches of tokens.

Run: python examples/02_tokenize_a_corpus.py
"""

import tempfile
from pathlib import Path

import ray

from raytron.config import DataConfig, TokenizerConfig
from raytron.data.describe import describe
from raytron.data.prepare import prepare
from raytron.data.shards import open_dataset
from raytron.data.stream import ShardStream
from raytron.data.tokenizer import Tokenizer


def write_text(folder: Path) -> None:
    """A small corpus: a hundred files, each a counting rhyme."""
    folder.mkdir()
    for start in range(100):
        lines = [
            f"{n} green bottles hanging on the wall, {n - 1} if one should fall." for n in range(start + 20, start, -1)
        ]
        (folder / f"rhyme_{start:03d}.txt").write_text("\n".join(lines))


def main() -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    with tempfile.TemporaryDirectory() as scratch:
        write_text(Path(scratch) / "text")
        data = DataConfig(
            sources=(f"{scratch}/text",), validation_fraction=0.1, tokenizer=TokenizerConfig(vocab=400, train_mb=1)
        )
        folder = prepare(
            data, Path(scratch) / "tokens", report=lambda fraction, message: print(f"{fraction:4.0%} {message}")
        )
        print(describe(folder, verify=True))

        # A step's samples depend on the seed and their ids alone, however many ranks share them.
        stream = ShardStream(open_dataset(folder), "train", sequence_length=32, seed=0)
        whole = stream.batch(first=0, count=6)
        halves = [stream.batch(first=0, count=6, part=part, parts=2) for part in range(2)]
        assert (whole.tokens == [*halves[0].tokens, *halves[1].tokens]).all()
        print(f"\nsample {whole.ids[0]} of {stream.samples_per_epoch} in an epoch:")
        print(Tokenizer(folder / "tokenizer.json", data.tokenizer.eod).decode(whole.tokens[0].tolist()))
    ray.shutdown()


if __name__ == "__main__":
    main()
