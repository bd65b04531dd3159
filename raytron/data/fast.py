"""Encoding with gigatoken where it gives the very ids that the tokenizer's own library gives.

gigatoken (an optional extra) encodes byte-level BPE and SentencePiece BPE tens of times faster than the library whose ids
it copies. A copy is checked, not trusted: of every task's text the first SAMPLE_CHARS are encoded by both. It remembers the
words that it has seen, without a bound: where a process grows large it is loaded anew.

    auto         gigatoken where it is installed, reads the tokenizer, and agrees on the sample; else the library, and why
    gigatoken    the same, but a reason against it is an error
    tokenizers   the library
"""

from __future__ import annotations

import base64
import gc
import json
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytron.data.tokenizer import Tokenizer
from raytron.errors import DataError, Problem

SAMPLE_CHARS = 2**17
RENEW_BYTES = 192 * 2**20  # by which the process may grow before gigatoken is loaded anew
FAST = "gigatoken"
WHERE = "data.tokenizer.backend"


class Encoder:
    """Encodes pieces of text by one backend or the other. Raises DataError where `gigatoken` is asked for and can't be.

    backend: `data.tokenizer.backend`.
    """

    def __init__(self, tokenizer: Tokenizer, backend: str):
        self.tokenizer, self.backend = tokenizer, backend
        self.reason = ""  # against gigatoken, in words
        self._unchecked = SAMPLE_CHARS
        self._fast: Any = None
        if backend != "tokenizers":
            self._fast, why_not = faster(tokenizer)
            self._fall_back(why_not)
        self._light = _resident_bytes()  # before it remembers anything

    @property
    def name(self) -> str:
        """Which library encodes."""
        return FAST if self._fast is not None else self.tokenizer.kind

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The ids of all texts, one after another, and how many each has: (total,), (texts,)."""
        if self._fast is not None and self._unchecked > 0:
            self._check(texts)
        if self._fast is None:
            parts = self.tokenizer.codec.encode_batch(texts)
            lengths = np.array([len(part) for part in parts], np.int64)
            return np.concatenate(parts) if parts else np.zeros(0, np.uint32), lengths
        found = _flat(self._fast, texts)
        if _resident_bytes() > self._light + RENEW_BYTES:
            self._renew()
        return found

    def _renew(self) -> None:
        """Forgets what gigatoken remembers."""
        self._fast = None
        gc.collect()
        self._fast, why_not = faster(self.tokenizer)
        self._fall_back(why_not)
        self._light = _resident_bytes()

    def _check(self, texts: Sequence[str]) -> None:
        """Compares both on a part of the texts; on the first difference the library takes over."""
        taken: list[str] = []
        for text in texts:
            if self._unchecked <= 0:
                break
            taken.append(text[: self._unchecked])
            self._unchecked -= len(text)
        try:
            ids, lengths = _flat(self._fast, taken)
            theirs = np.split(ids, np.cumsum(lengths)[:-1]) if taken else []
            ours = self.tokenizer.codec.encode_batch(taken)
        except Exception as error:  # the library is young: whatever it says, text is encoded
            self._fall_back(f"it failed: {type(error).__name__}: {error}")
            return
        for text, one, other in zip(taken, ours, theirs, strict=True):
            if not np.array_equal(one, other):
                self._fall_back(f"it gives other ids than {self.tokenizer.kind} for {_around(text, one, other)!r}")
                return

    def _fall_back(self, reason: str) -> None:
        if not reason:
            return
        if self.backend == FAST:
            raise DataError(Problem(WHERE, f"{FAST} can't be used: {reason}", "use auto or tokenizers"))
        self.reason, self._fast = reason, None


def _resident_bytes() -> int:
    """What the process has in memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def faster(tokenizer: Tokenizer) -> tuple[Any, str]:
    """gigatoken's tokenizer of the same ids, or None and why there is none."""
    try:
        import gigatoken
    except ImportError:
        return None, "it is not installed (raytron[fast])"
    try:
        if tokenizer.kind == "tokenizers":
            return gigatoken.Tokenizer.from_json(_without_special(tokenizer.content)), ""
        if tokenizer.kind == "sentencepiece":
            model = json.loads(tokenizer.content)["model"]
            return gigatoken.Tokenizer.from_sentencepiece(base64.b64decode(model)), ""
    except Exception as error:  # as for any format that it does not know
        return None, f"it does not read this tokenizer: {error}"
    return None, f"it is not used for a tokenizer of the kind {tokenizer.kind}"


def _without_special(content: bytes) -> str:
    """A tokenizer.json whose special tokens are never made from text."""
    facts = json.loads(content)
    facts["added_tokens"] = [token for token in facts.get("added_tokens") or [] if not token.get("special")]
    facts["post_processor"] = facts["truncation"] = facts["padding"] = None
    return json.dumps(facts)


def _flat(fast: Any, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    if not texts:
        return np.zeros(0, np.uint32), np.zeros(0, np.int64)
    rows = fast.encode_batch(list(texts), parallel=False).layout
    offsets = np.asarray(rows.offsets.data, np.int64)
    content = np.asarray(rows.content.data)[offsets[0] : offsets[-1]]
    return content.astype(np.uint32, copy=False), np.diff(offsets)


def _around(text: str, one: NDArray[np.uint32], other: NDArray[np.uint32]) -> str:
    """About the place of a text where two encodings part, which is guessed from the share of ids before it."""
    shared = min(len(one), len(other))
    same = int(np.argmax(one[:shared] != other[:shared])) if (one[:shared] != other[:shared]).any() else shared
    at = len(text) * same // max(len(one), 1)
    return text[max(at - 20, 0) : at + 20]
