"""A .model of SentencePiece (Kudo and Richardson, arXiv 1808.06226), read by its own library, an optional extra.

The model normalizes text (NFKC, runs of blanks, a blank in front, as it was trained to), so decoding need not give the
very text back. Control tokens such as </s> are never made from text.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytron.errors import DataError, Problem

KIND = "sentencepiece"


class SentencePieceCodec:
    """model: the bytes of a .model. Raises DataError without the library, RuntimeError for what is no model."""

    kind = KIND

    def __init__(self, model: bytes):
        try:
            import sentencepiece
        except ImportError:
            raise DataError(
                Problem(
                    "data.tokenizer.path", "a SentencePiece model needs its library", "install raytron[sentencepiece]"
                )
            ) from None
        self.model = model
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab: int = self._inner.get_piece_size()

    def id_of(self, token: str) -> int | None:
        found: int = self._inner.piece_to_id(token)
        return found if self._inner.id_to_piece(found) == token else None

    def special_tokens(self) -> list[str]:
        control = [one for one in range(self.vocab) if self._inner.is_control(one)]
        return [str(self._inner.id_to_piece(one)) for one in control]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(ids, np.uint32) for ids in self._inner.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode([one for one in ids if not self._inner.is_control(one)]))

    def packed(self) -> dict[str, Any]:
        return {"model": base64.b64encode(self.model).decode("ascii")}


def unpacked(facts: Mapping[str, Any]) -> SentencePieceCodec:
    return SentencePieceCodec(base64.b64decode(facts["model"]))
