"""Many random faults in one run, whose end has to be that of an undisturbed one: `python -m raytron.testing.soak`.

    step     2             4              6                   8      ...
             kill rank 1   stop rank 0    fill the disk ...   ...              every second step something happens
    weights, moments, losses, samples ── to the bit ── those of the run without faults

The faults are drawn from a seed and told as sentences (`raytron.testing.faults`), so that a run can be had again.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raytron.actors.controller import Seams
from raytron.actors.run import launch, tokenize
from raytron.checkpoint.catalog import find
from raytron.checkpoint.whole import read_whole
from raytron.config import RunConfig, load
from raytron.errors import ClusterError
from raytron.observe.records import Record, read_records
from raytron.observe.result import Result
from raytron.testing.faults import Faults
from raytron.testing.ledger import Ledger, committed
from raytron.training.open import open_trainer

WORKERS, SPARES, BATCH = 3, 2, 6
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n"
IN_A_STEP = ("forward", "all-reduce", "optimizer")


def _kill(rank: int, other: int, step: int, phase: str) -> list[str]:
    return [f"kill rank {rank} in the {phase} of step {step}"]


def _kill_two(rank: int, other: int, step: int, phase: str) -> list[str]:
    return [f"kill rank {each} in the forward of step {step}" for each in (rank, other)]


def _kill_writing(rank: int, other: int, step: int, phase: str) -> list[str]:
    return [f"kill rank {rank} in the write of step {step}"]


def _kill_in_damaged_memory(rank: int, other: int, step: int, phase: str) -> list[str]:
    return [
        f"damage the memory of rank {rank} in the forward of step {step}",
        f"kill rank {rank} in the all-reduce of step {step}",
    ]


def _stop(rank: int, other: int, step: int, phase: str) -> list[str]:
    return [f"stop rank {rank} in the {phase} of step {step}"]


def _seize(rank: int, other: int, step: int, phase: str) -> list[str]:
    return [f"seize rank {rank} in the forward of step {step}"]


def _fill(rank: int, other: int, step: int, phase: str) -> list[str]:
    return [f"fill the disk of rank {rank} in the write of step {step}"]


def _spoil(rank: int, other: int, step: int, phase: str) -> list[str]:
    return [f"spoil the disk of rank {rank} in the write of step {step}"]


KINDS: dict[str, tuple[int, Callable[[int, int, int, str], list[str]]]] = {  # by how often, of twenty
    "kill": (9, _kill),
    "kill two at once": (2, _kill_two),
    "kill while a checkpoint is written": (2, _kill_writing),
    "damage memory, then kill": (2, _kill_in_damaged_memory),
    "stop": (2, _stop),
    "seize the interpreter": (1, _seize),
    "disk full": (1, _fill),
    "disk error": (1, _spoil),
}


def draw(count: int, seed: int) -> list[tuple[str, list[str]]]:
    """Faults, each with its kind: at step 2, 4, 6, and so on."""
    rng = random.Random(seed)
    kinds = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()], k=count)
    faults = []
    for at, kind in enumerate(kinds):
        rank, other = rng.sample(range(WORKERS), 2)
        faults.append((kind, KINDS[kind][1](rank, other, 2 * at + 2, rng.choice(IN_A_STEP))))
    return faults


def soak(count: int, seed: int, folder: Path, say: Callable[[str], None] = lambda text: None) -> Record:
    """Runs it, in an empty folder; what happened, with `differs`: what was not as in the undisturbed run, in words."""
    drawn = draw(count, seed)
    sentences = [sentence for _, said in drawn for sentence in said]
    config = _configured(folder, 2 * count + 4)
    say(f"without faults: {config.steps} steps")
    plain = _run(config.replace(name="soak-plain", run_dir=str(folder / "plain")), open_trainer, folder, say)
    say(f"with {count} faults")
    faults = Faults(sentences, folder / "account")
    start = time.monotonic()
    result = _run(config.replace(name="soak", run_dir=str(folder / "soak")), faults, folder, say)
    seconds = time.monotonic() - start
    events = read_records(folder / "soak" / "events.jsonl")
    missed = sorted(set(sentences) - set(faults.happened()))
    samples = committed(folder / "ledger-soak", events)
    again = [event["last"] - event["first"] + 1 for event in events if event["event"] == "redo"]
    return {
        "seed": seed,
        "faults": count,
        "kinds": dict(Counter(kind for kind, _ in drawn)),
        "missed": missed,
        "workers": WORKERS,
        "steps": config.steps,
        "restarts": result.restarts,
        "sources": dict(Counter(str(event["source"]) for event in events if event["event"] == "workers")),
        "steps_redone": sum(again),
        "most_steps_redone_at_once": max(again, default=0),
        "wall_s": round(seconds, 1),
        "differs": _differences(result, plain) + _wrong_samples(samples, BATCH * config.steps),
    }


def _configured(folder: Path, steps: int) -> RunConfig:
    """A tiny run, on data that is made here."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for number in range(24):
        (corpus / f"{number}.txt").write_text(f"document {number}\n" + TEXT * (number % 5 + 3), encoding="utf-8")
    made: dict[str, Any] = {
        "steps": steps,
        "run_dir": str(folder / "data"),
        "global_batch_size": BATCH,
        "micro_batch_size": 1,
        "sequence_length": 16,
        "determinism": "canonical",
        "model": {"layers": 2, "hidden": 32, "heads": 2, "ffn": 48, "vocab": 300},
        "mesh": {"dp": WORKERS},
        "checkpoint": {"every": 2},
        "evaluate": {"batches": 0},
        "recovery": {"spares": SPARES, "max_restarts": 100_000},
        "cluster": {"cpus_per_worker": 0.25, "timeout_s": 60, "device": "cpu", "threads_per_worker": 1},
        "data": {"sources": [str(corpus)], "validation_fraction": 0.2, "tokenizer": {"vocab": 300}},
    }
    dataset = tokenize(load(made), lambda fraction, message: None)
    return load(made).replace(**{"data.dataset": str(dataset), "data.sources": []})


def _run(config: RunConfig, opens: Any, folder: Path, say: Callable[[str], None]) -> Result:
    told = ("lost", "workers", "checkpoint_failed", "damaged", "demoted", "guard", "error")

    def watch(news: Any) -> None:
        for event in news.events:
            if event["event"] in told:
                say(f"  {event['event']}: {event['message'].splitlines()[0][:150]}")

    run = launch(config, seams=Seams(open_trainer=Ledger(opens, folder / f"ledger-{config.name}")))
    try:
        return run.wait(on_news=watch)
    finally:
        run.close()


def _differences(result: Result, plain: Result) -> list[str]:
    """In what the ends of two runs differ."""
    if result.checkpoint is None or plain.checkpoint is None:
        raise ClusterError("a run ended without a checkpoint")
    found = []
    if [record["step"] for record in result.metrics] != [record["step"] for record in plain.metrics]:
        found.append("the steps that were recorded")
    if result.losses != plain.losses:
        found.append("losses")
    ours, theirs = (read_whole(find(path)) for path in (result.checkpoint, plain.checkpoint))
    if ours.keys() != theirs.keys():
        return [*found, "the names of tensors"]
    return found + [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def _wrong_samples(samples: Counter[int], count: int) -> list[str]:
    wrong = [f"sample {number} was used {samples[number]} times" for number in range(count) if samples[number] != 1]
    return wrong[:10] + [f"sample {number} is of no step" for number in samples if number >= count][:10]


def main() -> None:
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", __doc__)[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = soak(arguments.faults, arguments.seed, Path(folder), say=lambda text: print(text, flush=True))
    for key, value in outcome.items():
        print(f"{key:28s}{value}")
    sys.exit(bool(outcome["differs"] or outcome["missed"]))


if __name__ == "__main__":
    main()
