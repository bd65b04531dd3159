"""Conversations: their ids are those of the template laid over them, and only the assistant's turns are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from raytron.config import DataConfig, RunConfig, TokenizerConfig
from raytron.data.chat import CHATML, Chat, ChatError, encode, messages_of, read_template
from raytron.data.check import data_problems
from raytron.data.compact import compact
from raytron.data.corpus import resolve
from raytron.data.fast import Encoder
from raytron.data.parts import Splits
from raytron.data.prepare import prepare
from raytron.data.shard_file import read_shard
from raytron.data.shards import Dataset, open_dataset
from raytron.data.stream import open_stream
from raytron.data.tokenizer import Tokenizer
from raytron.errors import ConfigError, DataError
from raytron.rules import problems

EOD = "<|endoftext|>"
SPECIAL = [EOD, "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<s>", "</s>"]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many cats?"},
    {"role": "assistant", "content": "Two cats."},
    {"role": "user", "content": "\n And mice? "},
    {"role": "assistant", "content": " None."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator([one["content"] + "\n" for one in TALK] * 30 + ["user assistant system\n"] * 30, trainer)
    inner.save(str(path))
    return Tokenizer(path, EOD)


def tokens_and_spans(talk: list[dict[str, str]], tokenizer: Tokenizer, template: str) -> tuple[list[int], list[int]]:
    segments = Chat(template, tokenizer).segments(talk)
    flat, lengths, spans = encode([segments], Encoder(tokenizer, "auto"), tokenizer.eod)
    assert lengths.tolist() == [len(flat)]
    return flat.tolist(), spans[0]


def learned(talk: list[dict[str, str]], tokenizer: Tokenizer, template: str) -> list[str]:
    """The text of each loss span, special tokens as they are spelled."""
    ids, spans = tokens_and_spans(talk, tokenizer, template)
    inner = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    pairs = zip(spans[::2], spans[1::2], strict=True)
    return [inner.decode(ids[start:stop], skip_special_tokens=False) for start, stop in pairs]


def test_the_assistants_turns_are_learned_with_their_ends(tokenizer: Tokenizer) -> None:
    assert learned(TALK, tokenizer, CHATML) == ["Two cats.<|im_end|>\n", f" None.<|im_end|>\n{EOD}"]
    assert learned(TALK[:4], tokenizer, CHATML) == ["Two cats.<|im_end|>\n"]


@pytest.mark.parametrize("template", [CHATML, '{% set bos_token = "<s>" %}{% set eos_token = "</s>" %}' + MISTRAL])
def test_ids_are_those_of_hugging_face(tokenizer: Tokenizer, template: str) -> None:
    talk = TALK if template == CHATML else TALK[1:]
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path), chat_template=template)
    ids, spans = tokens_and_spans(talk, tokenizer, template)
    assert ids[:-1] == theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
    for number, one in enumerate(talk):
        if one["role"] == "assistant":
            prompt = theirs.apply_chat_template(talk[:number], add_generation_prompt=True, return_dict=False)
            assert ids[: len(prompt)] == prompt
            assert len(prompt) in spans[::2]


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=2, max_size=6),
)
def test_what_is_learned_is_what_was_said(tokenizer: Tokenizer, contents: list[str]) -> None:
    roles = ("user", "assistant")
    talk = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    said = [one["content"] + "<|im_end|>\n" for one in talk if one["role"] == "assistant"]
    said[-1] += EOD if len(talk) % 2 == 0 else ""
    assert learned(talk, tokenizer, CHATML) == said


def test_what_can_not_be_told_apart_is_refused(tokenizer: Tokenizer) -> None:
    chat = Chat(CHATML, tokenizer)
    for mark in ("<|im_end|>", EOD):
        with pytest.raises(ChatError, match="has a message that spells"):
            chat.segments([{"role": "user", "content": f"a{mark}b"}, TALK[2]])
    with pytest.raises(ChatError, match="is refused by the template: roles are user and assistant"):
        Chat(MISTRAL, tokenizer).segments(TALK)
    last_only = "{{ messages[-1].content }}"
    with pytest.raises(ChatError, match="is not built up turn by turn"):
        Chat(last_only, tokenizer).segments(TALK)
    with pytest.raises(DataError, match=r"data\.chat_template: is no template"):
        Chat("{% for", tokenizer)
    unsafe = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ChatError, match="is refused by the template"):
        Chat(unsafe, tokenizer).segments(TALK)


def test_marks_are_refused_where_they_are_no_special_tokens() -> None:
    with pytest.raises(ChatError, match=r"spells <\|im_end\|>"):
        Chat(CHATML, Tokenizer("byte", EOD)).segments([{"role": "user", "content": "<|im_end|>"}, TALK[2]])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Hi", "is no list of messages"),
        ([{"role": "user"}], "without a role or content"),
        ([{"role": "assistant", "content": None}], "without a role or content"),
        (TALK[:2], "has no turn of the assistant"),
        ([], "has no turn of the assistant"),
    ],
)
def test_what_is_no_conversation(value: Any, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        messages_of(value)


def test_the_template_beside_a_tokenizer_is_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "tokenizer.json")
    assert read_template(None, None) == read_template(None, path) == CHATML
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": MISTRAL}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert read_template(None, path) == '{% set bos_token = "<s>" %}{% set eos_token = "</s>" %}' + MISTRAL
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert read_template(None, path) == "newer"
    (tmp_path / "own.jinja").write_text("own")
    assert read_template(str(tmp_path / "own.jinja"), path) == "own"
    with pytest.raises(DataError, match=r"absent can't be read"):
        read_template(str(tmp_path / "absent"), path)


def talks(count: int) -> list[dict[str, Any]]:
    return [{"messages": [{**one, "content": f"{one['content']} {n}"} for one in TALK], "n": n} for n in range(count)]


def held(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    found = []
    for entry in dataset.manifest.shards:
        shard = dataset.read(entry)
        parts = np.split(shard.tokens, shard.offsets[1:-1])
        found += list(zip((part.tolist() for part in parts), shard.columns["loss_spans"].to_pylist(), strict=True))
    return sorted(found)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_a_data_set_of_conversations(local_ray: None, tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    path, rows = tmp_path / f"a.{kind}", pa.Table.from_pylist(talks(40))
    if kind == "parquet":
        parquet.write_table(rows, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
    else:
        lines = [json.dumps(one) for one in talks(40)]
        path.write_text("\n".join([*lines[:20], json.dumps({"messages": TALK[:1]}), *lines[20:]]))
    data = DataConfig(
        sources=(str(path),), format="chat", metadata_keys=("n",), on_bad_record="skip", validation_fraction=0.3,
        tokenizer=TokenizerConfig(path=str(tokenizer.path)),
    )  # fmt: skip
    dataset = open_dataset(prepare(data, tmp_path / "run" / "data"))
    dataset.verify()
    expected = [tokens_and_spans(one["messages"], tokenizer, CHATML) for one in talks(40)]
    assert held(dataset) == sorted(expected)
    assert 0 < dataset.documents("validation") < 40
    assert dataset.manifest.bad_records == (1 if kind == "jsonl" else 0)
    assert read_shard(dataset.path / dataset.manifest.shards[0].path).columns["loss_spans"].type == pa.list_(pa.int32())
    assert (dataset.path / "chat_template.jinja").read_text() == CHATML
    assert data_problems(RunConfig(run_dir=str(tmp_path / "run"), data=data)) == []


def test_a_tokenizer_is_trained_on_conversations(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(one) for one in talks(40)))
    data = DataConfig(
        sources=(f"{tmp_path}/a.jsonl",), format="chat", validation_fraction=0.3, tokenizer=TokenizerConfig(vocab=300)
    )
    dataset = open_dataset(prepare(data, tmp_path / "data"))
    trained = Tokenizer(dataset.tokenizer, EOD)
    assert held(dataset) == sorted(tokens_and_spans(one["messages"], trained, CHATML) for one in talks(40))


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
def test_of_packed_conversations_the_assistant_is_learned(
    local_ray: None, tokenizer: Tokenizer, tmp_path: Path, packing: str
) -> None:
    """From messages to the labels of an epoch: those in spans, each once, and no others."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(one) for one in talks(40)))
    data = DataConfig(
        sources=(f"{tmp_path}/a.jsonl",), format="chat", validation_fraction=0.3,
        tokenizer=TokenizerConfig(path=str(tokenizer.path)),
    )  # fmt: skip
    dataset = open_dataset(prepare(data, tmp_path / "data"))
    longest = max(len(tokens) for tokens, _ in held(dataset))
    changes = {"sequence_length": 3 * longest, "data.packing": packing, "data.too_long": "drop"}
    stream = open_stream(RunConfig().replace(**changes), dataset, "train")
    batch = stream.batch(0, stream.samples_per_epoch)
    learned = []
    for entry in dataset.entries("train"):
        shard = dataset.read(entry)
        for number, flat in enumerate(shard.columns["loss_spans"].to_pylist()):
            document = shard.tokens[shard.offsets[number] : shard.offsets[number + 1]].tolist()
            learned += [token for at in range(0, len(flat), 2) for token in document[flat[at] : flat[at + 1]]]
    assert learned
    assert sorted(batch.labels[batch.weights > 0].tolist()) == sorted(learned)
    assert (batch.weights > 0).sum() < (batch.labels != dataset.eod).sum() / 2


def test_spans_are_cut_with_their_document(tmp_path: Path) -> None:
    splits = Splits(tmp_path, 0, 300, 1e-9, 10**6, {"loss_spans": pa.list_(pa.int32())})
    lengths = np.array([4, 10])
    splits.add(np.arange(14, dtype=np.uint32), lengths, [1, 2], {"loss_spans": [[1, 4], [0, 2, 4, 8, 9, 10]]})
    train, validation = compact(tmp_path, splits.finish(), 10**6, 0.3)
    assert validation.tokens == 4
    assert read_shard(tmp_path / train.path).columns["loss_spans"].to_pylist() == [[1, 4], [0, 2, 4, 6]]
    assert read_shard(tmp_path / validation.path).columns["loss_spans"].to_pylist() == [[0, 2, 3, 4]]


def test_conversations_need_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    parquet.write_table(pa.table({"messages": ["text"]}), tmp_path / "b.parquet")
    data = DataConfig(sources=(str(tmp_path),), format="chat", chat_template=str(tmp_path / "absent"))
    found = data_problems(RunConfig(run_dir=str(tmp_path / "run"), data=data))
    assert [one.where for one in found] == ["data.format", "data.messages_key", "data.chat_template"]
    assert "has no messages" in found[0].what
    assert "column 'messages' of" in found[1].what
    (tmp_path / "c.jsonl").write_text('{"messages": 3}\n')
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError):
        resolve([str(tmp_path)])


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"data.format": "chat", "data.text_key": "body"}, "data.text_key"),
        ({"data.messages_key": "talk"}, "data.messages_key"),
        ({"data.chat_template": "t.jinja"}, "data.chat_template"),
        ({"data.format": "chat", "data.chat_template": " "}, "data.chat_template"),
        ({"data.format": "chat", "data.messages_key": ""}, "data.messages_key"),
        ({"data.format": "chat", "data.metadata_keys": ("messages",)}, "data.metadata_keys"),
    ],
)
def test_values_that_do_not_go_together(changes: dict[str, object], where: str) -> None:
    assert [one.where for one in problems(RunConfig().replace(**changes))] == [where]
