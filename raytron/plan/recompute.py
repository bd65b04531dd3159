"""What each block keeps for its backward, and what it makes again: the memory section as one treatment for each block.

    none        everything stays
    selective   parts of a block that cost much memory and little work run again (Korthikanti et al., arXiv 2205.05198):
                    attention    from q, k, v before norms and rotation to what the output projection takes
                    norm         the two norms before attention and feed-forward layer
                    activation   act(gate) · up
                    dropout      masks: they are keyed by position, so making one again is exact
    full        a block keeps its input alone and runs again (Chen et al., arXiv 1604.06174)

`recompute_stages` names the stages and `recompute_every` n treats the first of every n blocks in each of them. Offload
holds for every block but the very last of the model, whose backward follows its forward at once.
"""

from __future__ import annotations

from typing import NamedTuple

from raytron.config import MemoryConfig

WHOLE = "block"


class Treatment(NamedTuple):
    """Of one block: the parts that run again (WHOLE alone for all of it), and whether what it keeps goes to the host."""

    parts: frozenset[str] = frozenset()
    offload: bool = False


def treatments(memory: MemoryConfig, stage: int, last: bool, layers: int) -> tuple[Treatment, ...]:
    """For each of the `layers` blocks of a stage, `last` being whether it is the model's last."""
    chosen = memory.recompute_stages is None or stage in memory.recompute_stages
    parts = parts_of(memory) if chosen else frozenset()
    return tuple(
        Treatment(
            parts if layer % memory.recompute_every == 0 else frozenset(),
            memory.offload_activations and not (last and layer == layers - 1),
        )
        for layer in range(layers)
    )


def parts_of(memory: MemoryConfig) -> frozenset[str]:
    """What is recomputed of a block, where anything is."""
    if memory.recompute == "full":
        return frozenset({WHOLE})
    return frozenset(memory.recompute_parts if memory.recompute == "selective" else ())
