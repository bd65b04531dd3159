"""Random numbers of a sample: a pure function of (key, sample id, place), so that they are the same on every mesh.

No generator has a state that one would have to pass on: the number at place p of sample i is SplitMix64's output number
p + 1 when it starts from a mix of key and i (Steele, Lea and Flood, OOPSLA 2014). How many are asked for at once, and for
which other samples, changes nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raytron.data.order import GOLDEN, mix64_array


def uniform(key: int, ids: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """(n, count): numbers in [0, 1), of each of the sample ids (n,) those at places 0 to count - 1. key: 64 bits, as
    `raytron.data.order.derive_key` gives."""
    golden = np.uint64(GOLDEN)
    begin = mix64_array(ids.astype(np.uint64) * golden + np.uint64(key))
    bits = mix64_array(begin[:, None] + np.arange(1, count + 1, dtype=np.uint64) * golden)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(numbers: NDArray[np.float64], stop: int) -> NDArray[np.int64]:
    """Whole numbers in [0, stop) from numbers in [0, 1), of any shape."""
    return (numbers * stop).astype(np.int64)
