"""A tokenizer.json of the `tokenizers` library, and how a byte-level BPE is trained into one.

Byte-pair encoding (Sennrich, Haddow and Birch, arXiv 1508.07909) begins with the 256 bytes and joins, again and again,
the pair that occurs most often in the training text; on bytes (GPT-2) there is no unknown text. One more token ends each
document. Training is deterministic: the same text gives the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray

KIND = "tokenizers"


class JsonCodec:
    """content: of a tokenizer.json. Raises Exception, as the library does, for what it does not understand."""

    kind = KIND

    def __init__(self, content: bytes):
        self._inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self.vocab = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def id_of(self, token: str) -> int | None:
        found: int | None = self._inner.token_to_id(token)
        return found

    def special_tokens(self) -> list[str]:
        return [token.content for token in self._inner.get_added_tokens_decoder().values()]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def packed(self) -> None:
        return None


def trained(texts: Iterable[str], vocab: int, eod: str) -> str:
    """The content of a tokenizer.json: a byte-level BPE of up to `vocab` ids, the `eod` token id 0."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[eod],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return str(inner.to_str(pretty=False))
