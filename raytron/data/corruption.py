"""Span corruption: spans of a text are left out, and the model says what they were (T5: Raffel et al., arXiv 1910.10683).

    tokens     Thank you for inviting me to your party last week         noise: "for inviting", "last"
    inputs     Thank you <X> me to your party <Y> week <eod>
    targets    <X> for inviting <Y> last <eod>

15 % of the tokens are noise, in spans of 3 on average. Noise and the rest are each cut in as many parts at places drawn at
random, and laid out by turns, the rest first. Sentinels <X>, <Y>, … are the ids from the top of the vocabulary downwards.
Inputs are for an encoder, targets for a decoder that sees it; put into each other they are the text again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raytron.data.draw import uniform
from raytron.data.order import derive_key

SITE = 0x543553  # sets these draws apart from others of the same seed


class Corrupted(NamedTuple):
    """One text as a model is asked for it."""

    inputs: NDArray[np.int64]  # (n - noise + spans + 1,)
    targets: NDArray[np.int64]  # (noise + spans + 1,)


@dataclass(frozen=True)
class SpanCorruption:
    """How texts are corrupted. Lengths depend on the length of the text alone, not on what is drawn."""

    seed: int
    vocab: int  # sentinels are vocab - 1, vocab - 2, …
    eod: int  # id that ends inputs and targets
    rate: float = 0.15  # share of tokens that are noise
    mean_span: float = 3.0  # tokens of a span of noise, on average

    def amounts(self, length: int) -> tuple[int, int]:
        """Tokens of noise, and spans of it, in a text of `length` tokens, two or more. Raises ValueError for fewer."""
        if length < 2:
            raise ValueError(f"a text of {length} tokens has no room for noise and the rest")
        noise = min(max(round(length * self.rate), 1), length - 1)
        return noise, min(max(round(noise / self.mean_span), 1), length - noise)

    def fitting(self, inputs: int) -> tuple[int, int]:
        """The most tokens of a text whose inputs are not longer than `inputs`, and the length of its targets. Raises
        ValueError where no text is so short."""
        length = inputs  # a text is longer than its inputs, or nearly
        while length > 1 and self._lengths(length)[0] > inputs:
            length -= 1
        while length > 1 and self._lengths(length + 1)[0] <= inputs:
            length += 1
        return length, self._lengths(length)[1]

    def _lengths(self, length: int) -> tuple[int, int]:
        """Of the inputs and of the targets of a text."""
        noise, spans = self.amounts(length)
        return length - noise + spans + 1, noise + spans + 1

    def __call__(self, tokens: NDArray[np.int64], sample: int) -> Corrupted:
        """The text (n,), corrupted as its sample id says. Raises ValueError where it holds a sentinel, or fewer than two
        tokens."""
        noise, spans = self.amounts(len(tokens))
        if tokens.max() >= self.vocab - spans:
            raise ValueError(f"token {tokens.max()} is among the {spans} sentinels at the top of {self.vocab} ids")
        draws = uniform(derive_key(self.seed, SITE), np.array([sample]), len(tokens))[0]
        kept = _parts(len(tokens) - noise, spans, draws)
        left_out = _parts(noise, spans, draws[len(tokens) - noise :])
        is_noise = np.repeat(np.tile([False, True], spans), np.stack([kept, left_out], axis=1).reshape(-1))
        sentinels = self.vocab - 1 - np.arange(spans)
        inputs = np.insert(tokens[~is_noise], np.cumsum(kept), sentinels)
        targets = np.insert(tokens[is_noise], np.cumsum(left_out) - left_out, sentinels)
        return Corrupted(np.append(inputs, self.eod), np.append(targets, self.eod))


def _parts(total: int, parts: int, draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """(parts,): `total` cut in parts of 1 or more, every way equally likely. draws: total - 1 of them are used."""
    cuts = np.sort(np.argsort(draws[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
