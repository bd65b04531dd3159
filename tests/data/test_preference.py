"""Pairs of answers: two documents side by side, in one split, of which what differs is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from raytron.config import DataConfig, RunConfig, TokenizerConfig
from raytron.data import task
from raytron.data.chat import CHATML, Chat, ChatError, encode, pair_of
from raytron.data.check import data_problems
from raytron.data.corpus import resolve
from raytron.data.fast import Encoder
from raytron.data.prepare import prepare
from raytron.data.records import Fields
from raytron.data.shard_file import read_shard
from raytron.data.shards import Dataset, open_dataset
from raytron.data.task import Job, tokenize_group
from raytron.data.tokenizer import Tokenizer
from raytron.rules import problems

EOD = "<|endoftext|>"


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def a_pair(n: int) -> dict[str, Any]:
    before = [say("user", f"question {n}"), say("assistant", "which?"), say("user", "that")]
    return {"prompt": before, "chosen": [say("assistant", f"good {n}")], "rejected": [say("assistant", f"bad {n}")]}


def whole(n: int) -> list[list[dict[str, str]]]:
    return [[*a_pair(n)["prompt"], *a_pair(n)[side]] for side in ("chosen", "rejected")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [say("user", "q")], "chosen": [say("assistant", "a")], "rejected": [say("assistant", "b")]},
        {"prompt": "q", "chosen": [say("user", "q"), say("assistant", "a")], "rejected": "b"},
        {"chosen": [say("user", "q"), say("assistant", "a")], "rejected": [say("user", "q"), say("assistant", "b")]},
    ],
)
def test_every_shape_of_a_pair(record: dict[str, Any]) -> None:
    expected = [[say("user", "q"), say("assistant", one)] for one in "ab"]
    assert pair_of(record) == (*expected, 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "do not differ in a turn of the assistant"),
        ({"prompt": "q", "chosen": "a"}, "is no list of messages"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "is no list of messages"),
        ({"prompt": "q", "chosen": "a", "rejected": [say("user", "b")]}, "has no turn of the assistant"),
    ],
)
def test_what_is_no_pair(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ChatError, match=message):
        pair_of(record)


def held(dataset: Dataset) -> dict[int, list[tuple[str, bool, list[int], list[int]]]]:
    """The two documents of each pair: split, side, tokens, loss spans; in the order in which they stand."""
    found: dict[int, list[tuple[str, bool, list[int], list[int]]]] = {}
    for entry in dataset.manifest.shards:
        shard = dataset.read(entry)
        columns = {name: column.to_pylist() for name, column in shard.columns.items()}
        for row, pair in enumerate(columns["pair_id"]):
            tokens = shard.tokens[shard.offsets[row] : shard.offsets[row + 1]].tolist()
            side = (entry.split, columns["chosen"][row], tokens, columns["loss_spans"][row])
            found.setdefault(pair, []).append(side)
        assert columns["pair_id"][::2] == columns["pair_id"][1::2]
    return found


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_data_set_of_pairs(local_ray: None, tmp_path: Path, kind: str) -> None:
    path, rows = tmp_path / f"a.{kind}", [a_pair(n) for n in range(40)]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "q", "chosen": "a", "rejected": "a"}, {"n": 1}])))
    data = DataConfig(
        sources=(str(path),), format="preference", on_bad_record="skip", validation_fraction=0.3,
        tokenizer=TokenizerConfig(path="byte"),
    )  # fmt: skip
    dataset = open_dataset(prepare(data, tmp_path / "run" / "data"))
    dataset.verify()
    pairs = held(dataset)
    assert len(pairs) == 40
    assert dataset.manifest.bad_records == (2 if kind == "jsonl" else 0)
    tokenizer = Tokenizer("byte", EOD)
    chat, encoder = Chat(CHATML, tokenizer), Encoder(tokenizer, "auto")
    expected = [encode([chat.segments(one, 3) for one in whole(n)], encoder, 256) for n in range(40)]
    said = {tuple(flat.tolist()): spans for flat, _, spans in expected}
    for (split, chosen, tokens, spans), (other, rejected, more, others) in pairs.values():
        assert (chosen, rejected) == (True, False)
        assert split == other
        assert said[(*tokens, *more)] == [spans, others]
        assert "good" in bytes(tokens[spans[0] : spans[1] - 1]).decode()
        assert len(spans) == 2
    assert {sides[0][0] for sides in pairs.values()} == {"train", "validation"}
    assert data_problems(RunConfig(run_dir=str(tmp_path / "run"), data=data)) == []


@pytest.mark.parametrize("chunk", [1, 100, 200])
def test_a_pair_is_never_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(task, "CHUNK_CHARS", chunk)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(a_pair(n)) for n in range(20)))
    tokenizer = Tokenizer("byte", EOD).save(tmp_path / "tokenizer.json")
    job = Job(str(tmp_path), str(tokenizer.path), EOD, "chosen", 0.3, 1, format="preference", chat_template=CHATML)
    units = resolve([f"{tmp_path}/a.jsonl"], fields=Fields("chosen", format="preference")).units
    done = tokenize_group(0, units, job)[0]
    assert done.documents == 40
    for part in done.parts:
        pairs = read_shard(Path(part.path)).columns["pair_id"].to_pylist()
        assert pairs[::2] == pairs[1::2]


def test_pairs_need_their_columns(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"chosen": ["a"], "prompt": ["q"]}), tmp_path / "b.parquet")
    data = DataConfig(sources=(str(tmp_path),), format="preference")
    found = data_problems(RunConfig(run_dir=str(tmp_path / "run"), data=data))
    assert [(one.where, "no column 'rejected'" in one.what) for one in found] == [("data.format", True)]
    kept = RunConfig(data=DataConfig(format="preference", metadata_keys=("prompt",)))
    assert [one.where for one in problems(kept)] == ["data.format", "data.metadata_keys"]
