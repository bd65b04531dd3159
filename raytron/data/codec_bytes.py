"""Bytes as token ids, without any file: id b is the byte b, and one more id ends a document.

The vocabulary of 257 has no unknown text and nothing to train, at four to five times as many tokens as a trained one of
tens of thousands (ByT5, Xue et al., arXiv 2105.13626).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

KIND = "byte"
BYTES = 256


class ByteCodec:
    """eod: how the token that ends a document is called; its id is 256."""

    kind = KIND
    vocab = BYTES + 1

    def __init__(self, eod: str):
        self.eod = eod

    def id_of(self, token: str) -> int | None:
        return BYTES if token == self.eod else None

    def special_tokens(self) -> list[str]:
        return [self.eod]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(one for one in ids if one < BYTES).decode("utf-8", errors="replace")

    def packed(self) -> dict[str, Any]:
        return {"eod": self.eod}


def unpacked(facts: Mapping[str, Any]) -> ByteCodec:
    return ByteCodec(str(facts["eod"]))
