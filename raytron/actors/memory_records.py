"""Steps that memory holds and the controller has not heard of: their records come with the state.

    controller   has heard of … 7 │                          │ hears of 8 … 31, goes on with 32
    memory       …                │ state of 31, records of 8 … 31
                                  ✗ all ranks die at once, between two looks

A step counts only with its record: metrics.jsonl has one line for each committed step. So the newest whole state is taken if
the records of all steps since the newest known one lie beside it (`raytron.training.journal`), else that of the newest step
that is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raytron.checkpoint.sources import Choice, Held, MemoryGeneration, choose
from raytron.observe.records import Record


def untold(generation: MemoryGeneration, known: int) -> list[Record] | None:
    """The records of the steps after `known` up to the generation's, in order; None where one is not there."""
    found = {note.get("step"): note for held in generation.sources for note in held.head.notes}
    records = [found.get(step) for step in range(known + 1, generation.step + 1)]
    whole = [record for record in records if record is not None]
    return whole if len(whole) == len(records) else None


def choose_told(held: Iterable[Held], known: int, epoch: int | None) -> Choice:
    """As `raytron.checkpoint.sources.choose`, of steps up to `known`, and of later ones that bring their records.

    epoch: the one that `known` is a step of; other epochs may have gone on from there otherwise. None: no later steps.
    """
    held = list(held)
    own: Sequence[Held] = [each for each in held if each.epoch == epoch and each.step > known]
    later = choose(own).generation
    if later is not None and untold(later, known) is not None:
        return Choice(later, [])
    return choose(held, up_to=known)
