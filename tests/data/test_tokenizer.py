from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.data.tokenizer import Tokenizer, pieces, train_tokenizer
from raytron.errors import ConfigError, DataError

EOD = "<|endoftext|>"
TEXT = ["def add(a, b):\n    return a + b\n", "the cat sat on the mat, the cat sat\n"] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(tmp_path_factory.mktemp("bpe") / "tokenizer.json", TEXT, 280, EOD)


def test_training_is_deterministic_and_loads_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(tmp_path / "tokenizer.json", iter(TEXT), 280, EOD)
    assert again.sha256 == tokenizer.sha256
    assert Tokenizer(tokenizer.path, EOD).sha256 == tokenizer.sha256
    assert (tokenizer.vocab, tokenizer.eod) == (280, 0)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 < one < tokenizer.vocab for one in ids)


def test_documents_end_and_cannot_end_each_other(tokenizer: Tokenizer) -> None:
    documents = tokenizer.encode_documents(["the cat", f"a {EOD} b"])
    assert documents[0].tolist() == [*tokenizer.encode("the cat"), tokenizer.eod]
    assert documents[1].tolist().count(tokenizer.eod) == 1


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab \n\té", max_size=200), limit=st.integers(1, 50))
def test_pieces_join_to_the_text(text: str, limit: int) -> None:
    assert "".join(pieces(text, limit)) == text


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(st.text(alphabet="catsd e:", min_size=1, max_size=12), min_size=1, max_size=30))
def test_pieces_cut_at_line_ends_encode_as_the_whole(tokenizer: Tokenizer, lines: list[str]) -> None:
    text = "\n".join(f"x{line}x" for line in lines)
    apart = [one for piece in pieces(text, 20) for one in tokenizer.encode(piece)]
    assert apart == tokenizer.encode(text)


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="256 ids have no room"):
        train_tokenizer(tmp_path / "tokenizer.json", TEXT, 256, EOD)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        Tokenizer(tmp_path / "a.json", EOD)
    with pytest.raises(DataError, match="can't be read: No such file"):
        Tokenizer(tmp_path / "b.json", EOD)


def test_an_unknown_end_of_document_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"has no token '</s>'\n.*use one of: <\|endoftext\|>"):
        Tokenizer(tokenizer.path, "</s>")
