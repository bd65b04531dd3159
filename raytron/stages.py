"""Pipeline stages as text: what `pipeline.layout` says.

    Et|tt|tt|tL      E the embedding, t a layer, L the loss head, | the end of a stage: 1, 2, 2 and 1 layers
    E|(tt|)*3L       a group repeated: E alone, three stages of two layers, L alone
    Et*4||t*4L       one symbol repeated; a stage with nothing in it passes on what it gets

The embedding opens the first stage and the loss head closes the last. Blanks mean nothing.
"""

from __future__ import annotations

import re

from raytron.errors import ConfigError, Problem

WHERE = "pipeline.layout"
LONGEST = 100_000  # symbols that a layout may repeat its way up to


def read_stages(text: str) -> tuple[int, ...]:
    """How many layers each stage has. Raises ConfigError with the first thing that is wrong."""
    symbols = _expand(re.sub(r"\s", "", text))
    for symbol, name, place in (("E", "the embedding", "first"), ("L", "the loss head", "last")):
        at = 0 if symbol == "E" else -1
        if symbols.count(symbol) != 1 or symbols[at] != symbol:
            raise _wrong(text, f"{name} ({symbol}) does not stand once, as the {place} symbol", f"put {symbol} {place}")
    return tuple(stage.count("t") for stage in symbols.split("|"))


def write_stages(sizes: tuple[int, ...]) -> str:
    """The text of a number of layers in each stage: `read_stages` of it gives them again."""
    return f"E{'|'.join('t' * size for size in sizes)}L"


def _expand(text: str) -> str:
    """The symbols, all repeats written out: the innermost group first."""
    plain = text
    while found := re.search(r"(?:\(([EtL|]*)\)|([EtL|]))\*(\d+)|\(([EtL|]*)\)(?!\*)", plain):
        group, single, times, bare = found.groups()
        unit = next(part for part in (group, single, bare) if part is not None)
        count = 1 if times is None else int(times)
        if count * max(1, len(unit)) > LONGEST:
            raise _wrong(text, f"more than {LONGEST} symbols", "repeat less")
        plain = plain[: found.start()] + unit * count + plain[found.end() :]
    unknown = re.search(r"[^EtL|]", plain)
    if unknown or not plain:
        what = f"{unknown[0]!r} can't be read" if unknown else "is empty"
        raise _wrong(text, what, "write E, t, L and |, and repeats such as t*4 or (tt|)*3")
    return plain


def _wrong(text: str, what: str, remedy: str) -> ConfigError:
    return ConfigError([Problem(WHERE, f"in {text!r}: {what}", remedy)])
