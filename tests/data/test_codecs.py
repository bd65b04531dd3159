"""Every format of a tokenizer behind one interface: ids as its own library gives them, one file that holds it whole."""

from __future__ import annotations

import base64
import io
import string
from pathlib import Path

import pytest
import regex
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public as published
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import DataConfig, RunConfig, TokenizerConfig
from raytron.data import codec_sentencepiece, codec_tiktoken
from raytron.data.check import data_problems
from raytron.data.codec_tiktoken import SCHEMES
from raytron.data.prepare import prepare
from raytron.data.shards import open_dataset
from raytron.data.tokenizer import Tokenizer, token_ids, train_tokenizer
from raytron.errors import ConfigError, DataError

EOD = "<|endoftext|>"
TEXT = ["the cat sat on the mat", "a cat, a hat; 1234 mice", "def add(a, b):\n    return a + b"] * 40
WORDS = (" t", "he", " the", "at", " c", " cat")  # joined from the bytes, in this order


def ranks() -> dict[bytes, int]:
    tokens = [bytes([one]) for one in range(256)] + [word.encode() for word in WORDS]
    return {token: rank for rank, token in enumerate(tokens)}


def write_ranks(path: Path) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks().items()))
    return path


def write_sentencepiece(path: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("formats")
    return {
        "byte": Tokenizer("byte", EOD),
        "tokenizers": train_tokenizer(folder / "t.json", TEXT, 300, EOD),
        "sentencepiece": Tokenizer(write_sentencepiece(folder / "t.model"), "</s>"),
        "tiktoken": Tokenizer(write_ranks(folder / "t.tiktoken"), EOD, "cl100k"),
    }


KINDS = ["byte", "tokenizers", "sentencepiece", "tiktoken"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_holds_any_tokenizer_whole(tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    stored = tokenizer.save(tmp_path / "tokenizer.json")
    assert (stored.kind, stored.vocab, stored.eod, stored.sha256) == (
        kind, tokenizer.vocab, tokenizer.eod, tokenizer.sha256,
    )  # fmt: skip
    for text in ("the cat", "ä€😀 12345\n\n x", ""):
        assert stored.encode(text) == tokenizer.encode(text)
    assert stored.save(tmp_path / "again.json").sha256 == tokenizer.sha256
    end = "</s>" if kind == "sentencepiece" else EOD
    assert token_ids(tmp_path / "tokenizer.json", ["absent", end]) == [None, tokenizer.eod]
    with pytest.raises(ConfigError, match=r"has no token 'absent'\n.*use one of: "):
        Tokenizer(tmp_path / "tokenizer.json", "absent")


@pytest.mark.parametrize("kind", KINDS)
def test_documents_end_and_cannot_end_each_other(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    end = "</s>" if kind == "sentencepiece" else EOD
    for document in tokenizer.encode_documents(["the cat", f"a {end} b", f"{end}"]):
        assert document.tolist().count(tokenizer.eod) == 1
        assert document[-1] == tokenizer.eod
        assert document.max() < tokenizer.vocab


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for kind in ("byte", "tokenizers", "tiktoken"):
        ids = tokenizers[kind].encode(text)
        assert tokenizers[kind].decode([*ids, tokenizers[kind].eod]) == text


def test_bytes_are_their_own_ids() -> None:
    tokenizer = Tokenizer("byte", EOD)
    assert tokenizer.encode("aä") == [97, 0xC3, 0xA4]
    assert (tokenizer.vocab, tokenizer.eod) == (257, 256)
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"


def test_sentencepiece_ids_are_the_librarys(tokenizers: dict[str, Tokenizer]) -> None:
    path = tokenizers["sentencepiece"].path
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in [*TEXT[:3], "ä€😀", "  two  blanks "]:
        assert tokenizers["sentencepiece"].encode(text) == library.encode(text)
        assert tokenizers["sentencepiece"].decode(library.encode(text)) == library.decode(library.encode(text))
    assert tokenizers["sentencepiece"].eod == library.eos_id()


def test_tiktoken_ids_are_the_librarys(tokenizers: dict[str, Tokenizer]) -> None:
    library = tiktoken.Encoding("x", pat_str=SCHEMES["cl100k"].pattern, mergeable_ranks=ranks(), special_tokens={})
    for text in [*TEXT[:3], "ä€😀", "  two  blanks "]:
        assert tokenizers["tiktoken"].encode(text) == library.encode_ordinary(text)
    assert tokenizers["tiktoken"].encode("the cat") == [ranks()[one] for one in (b"t", b"he", b" cat")]
    assert (tokenizers["tiktoken"].eod, tokenizers["tiktoken"].vocab) == (262, 263)


@pytest.fixture(scope="module")
def encodings() -> dict[str, dict[str, object]]:
    """The published encodings, without their ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "load_tiktoken_bpe", lambda *_args, **_kwargs: {})
        return {"gpt2": published.r50k_base(), "cl100k": published.cl100k_base(), "o200k": published.o200k_base()}


@settings(max_examples=400, deadline=None)
@given(text=st.text(st.sampled_from(string.ascii_letters[:8] + "TS'0123 \t\n\r.,/ä€中\u0301"), max_size=40))
def test_patterns_cut_as_the_published_ones(encodings: dict[str, dict[str, str]], text: str) -> None:
    for name, encoding in encodings.items():
        assert regex.findall(SCHEMES[name].pattern, text) == regex.findall(encoding["pat_str"], text), name


def test_special_tokens_have_their_published_ids(encodings: dict[str, dict[str, dict[str, int]]]) -> None:
    for name, encoding in encodings.items():
        assert SCHEMES[name].special.items() <= encoding["special_tokens"].items()


def test_ranks_need_a_pattern_and_nothing_else_does(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "t.model")  # as Llama 3 names its ranks
    with pytest.raises(ConfigError, match=r"data.tokenizer.pattern: is missing.*\n.*gpt2, cl100k, o200k, llama3"):
        Tokenizer(path, EOD)
    with pytest.raises(ConfigError, match="is no regular expression"):
        Tokenizer(path, EOD, "(")
    with pytest.raises(ConfigError, match="has no effect: byte is no ranks of tiktoken"):
        Tokenizer("byte", EOD, "gpt2")
    assert Tokenizer(path, EOD, r"\w+|\W+").encode("the cat") == Tokenizer(path, EOD, r"\w+|\W").encode("the cat")


@pytest.mark.parametrize("content", [b"nothing of ours", b'{"raytron_tokenizer": "other"}', b"YQ== 0\nbroken\n"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(DataError, match="is not a tokenizer"):
        Tokenizer(tmp_path / "t", EOD, "gpt2" if content.startswith(b"YQ") else None)


@pytest.mark.parametrize(
    ("module", "make"), [(codec_sentencepiece, write_sentencepiece), (codec_tiktoken, write_ranks)]
)
def test_a_library_that_is_missing_is_named(
    module: object, make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "t")  # type: ignore[operator]
    kind = module.KIND  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, kind, None)
    with pytest.raises(DataError, match=rf"needs? (its|their) library|install raytron\[{kind}\]"):
        Tokenizer(path, EOD, "gpt2" if kind == "tiktoken" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_is_built_with_any(
    local_ray: None, tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path
) -> None:
    (tmp_path / "text").mkdir()
    for n in range(20):
        (tmp_path / "text" / f"{n}.txt").write_text(f"cat {n} sat on mat {n * 7}")
    config = TokenizerConfig(
        path=str(tokenizers[kind].path),
        eod="</s>" if kind == "sentencepiece" else EOD,
        pattern="cl100k" if kind == "tiktoken" else None,
    )
    data = DataConfig(sources=(str(tmp_path / "text"),), validation_fraction=0.2, tokenizer=config)
    dataset = open_dataset(prepare(data, tmp_path / "run" / "data"))
    dataset.verify()
    tokenizer = Tokenizer(dataset.tokenizer, config.eod)
    texts = []
    for entry in dataset.manifest.shards:
        shard = dataset.read(entry)
        for start, stop in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            texts.append(tokenizer.decode(shard.tokens[start : stop - 1].tolist()))
    assert sorted(texts) == sorted(path.read_text() for path in (tmp_path / "text").iterdir())
    run = RunConfig(run_dir=str(tmp_path / "run"), data=data)
    assert data_problems(run) == []
    small = run.replace(**{"model.vocab": dataset.vocab - 1})
    assert f"set model.vocab to {dataset.vocab} or more" in str(data_problems(small)[0])
    assert f"model.vocab to {dataset.vocab} or more" in str(
        data_problems(small.replace(run_dir=str(tmp_path / "absent")))[0]
    )
    other = train_tokenizer(tmp_path / "other.json", TEXT, 270, EOD)
    mismatch = RunConfig(data=DataConfig(dataset=str(dataset.path), tokenizer=TokenizerConfig(path=str(other.path))))
    assert "was tokenized with another tokenizer" in str(data_problems(mismatch)[0])
