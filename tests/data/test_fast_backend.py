"""gigatoken in place of the tokenizer's library: used where it agrees, dropped with a reason where it does not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import DataConfig, RunConfig, TokenizerConfig
from raytron.data import fast
from raytron.data.check import data_problems
from raytron.data.describe import describe
from raytron.data.fast import SAMPLE_CHARS, Encoder
from raytron.data.prepare import prepare
from raytron.data.shards import open_dataset
from raytron.data.task import Job, tokenize_group
from raytron.data.tokenizer import Tokenizer, train_tokenizer
from raytron.errors import DataError

EOD = "<|endoftext|>"
TEXT = ["def add(a, b):\n    return a + b\n", "the cat sat on the mat, the cat sat 12345\n"] * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(tmp_path_factory.mktemp("bpe") / "tokenizer.json", TEXT, 320, EOD)


def ids(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    flat, lengths = encoder.encode(texts)
    return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=5))
def test_both_backends_give_the_same_ids(tokenizer: Tokenizer, texts: list[str]) -> None:
    texts = [*texts, f"a {EOD} b", ""]
    encoder = Encoder(tokenizer, "gigatoken")
    encoder._unchecked = 0  # compared here
    assert ids(encoder, texts) == ids(Encoder(tokenizer, "tokenizers"), texts) == list(map(tokenizer.encode, texts))
    assert encoder.name == "gigatoken"


def test_auto_takes_it_and_the_library_stays_where_asked(tokenizer: Tokenizer) -> None:
    assert Encoder(tokenizer, "auto").name == "gigatoken"
    assert Encoder(tokenizer, "tokenizers").name == "tokenizers"
    assert Encoder(Tokenizer("byte", EOD), "auto").name == "byte"
    assert "a tokenizer of the kind byte" in Encoder(Tokenizer("byte", EOD), "auto").reason


def lying(real: Any) -> Any:
    """gigatoken, but where a cat is told of its last id is another."""

    def flat(inner: Any, texts: list[str]) -> Any:
        found, lengths = real(inner, texts)
        found = found.copy()
        if "cat" in texts[-1]:
            found[-1] ^= 1
        return found, lengths

    return flat


def test_another_id_in_the_sample_falls_back(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_flat", lying(fast._flat))
    encoder = Encoder(tokenizer, "auto")
    for text in TEXT[:6]:
        assert ids(encoder, [text]) == [tokenizer.encode(text)]
    assert encoder.name == "tokenizers"
    assert encoder.reason.startswith("it gives other ids than tokenizers for ")
    asked = Encoder(tokenizer, "gigatoken")
    with pytest.raises(DataError, match=r"data.tokenizer.backend: gigatoken can't be used: it gives other ids"):
        ids(asked, TEXT[:2])


def test_the_sample_ends(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = type(tokenizer.codec).encode_batch

    def counted(codec: Any, texts: list[str]) -> Any:
        asked.append(sum(map(len, texts)))
        return real(codec, texts)

    monkeypatch.setattr(type(tokenizer.codec), "encode_batch", counted)
    encoder = Encoder(tokenizer, "auto")
    for _ in range(4):
        encoder.encode(["so it goes, " * 5000])
    assert sum(asked) == SAMPLE_CHARS
    assert encoder.name == "gigatoken"


def test_what_it_remembers_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = fast.faster

    def counted(given: Tokenizer) -> Any:
        made.append(1)
        return real(given)

    monkeypatch.setattr(fast, "faster", counted)
    resident = iter([100, 200, 301, 150, 350, 351, 160])  # at first; after two texts, renewed; after two, renewed
    monkeypatch.setattr(fast, "_resident_bytes", lambda: next(resident))
    monkeypatch.setattr(fast, "RENEW_BYTES", 200)
    encoder = Encoder(tokenizer, "gigatoken")
    for text in TEXT[:4]:
        assert ids(encoder, [text]) == [tokenizer.encode(text)]
    assert len(made) == 3


def test_without_it_auto_says_why_and_asking_for_it_is_a_problem(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = Encoder(tokenizer, "auto")
    assert (encoder.name, encoder.reason) == ("tokenizers", "it is not installed (raytron[fast])")
    given = TokenizerConfig(path=str(tokenizer.path), backend="gigatoken")
    config = RunConfig(run_dir=str(tmp_path), data=DataConfig(tokenizer=given))
    assert [(one.where, one.remedy) for one in data_problems(config)] == [
        ("data.tokenizer.backend", "use auto or tokenizers")
    ]


def test_a_tokenizer_that_it_does_not_read(tmp_path: Path) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    inner.add_special_tokens([EOD])
    inner.save(str(tmp_path / "t.json"))
    encoder = Encoder(Tokenizer(tmp_path / "t.json", EOD), "auto")
    assert encoder.reason.startswith("it does not read this tokenizer: ")
    assert ids(encoder, ["a b"]) == [Tokenizer(tmp_path / "t.json", EOD).encode("a b")]


def test_every_backend_writes_the_same_parts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from raytron.data.corpus import resolve

    (tmp_path / "a.txt").write_text("\n".join(TEXT) * 20 + EOD)
    found = {}
    for backend in ("tokenizers", "gigatoken"):
        (tmp_path / backend).mkdir()
        job = Job(str(tmp_path / backend), str(tokenizer.path), EOD, "text", 0.1, backend=backend)
        done, counts = tokenize_group(0, resolve([f"{tmp_path}/a.txt"]).units, job)
        found[backend] = (done.digest, done.tokens, counts.tolist(), [part.xxh3_128 for part in done.parts])
        assert done.backend == backend
    assert found["tokenizers"] == found["gigatoken"]


def test_the_manifest_says_which_was_used(local_ray: None, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for n in range(20):
        (tmp_path / "text" / f"{n}.txt").write_text(f"cat {n} sat on mat {n * 7}")
    data = DataConfig(sources=(str(tmp_path / "text"),), tokenizer=TokenizerConfig(path=str(tokenizer.path)))
    told: list[str] = []
    ours = open_dataset(prepare(data, tmp_path / "fast", lambda share, message: told.append(message)))
    assert "encoding with gigatoken" in told
    assert ours.manifest.backend == "gigatoken"
    assert "encoded by  gigatoken" in describe(ours.path)
    slow = DataConfig(sources=data.sources, tokenizer=TokenizerConfig(path=str(tokenizer.path), backend="tokenizers"))
    theirs = open_dataset(prepare(slow, tmp_path / "slow"))
    assert theirs.manifest.backend == "tokenizers"
    assert theirs.hash == ours.hash
    assert prepare(slow, tmp_path / "fast") == tmp_path / "fast"
    progress = next(message for message in told if message.startswith("tokenized "))
    assert "tokens/s, 0:00:00 left" in progress
