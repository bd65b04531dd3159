"""What a run ends with: its numbers, where its checkpoint lies, and how it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raytron.observe.draw import loss_curve, page
from raytron.observe.records import Record, read_records
from raytron.observe.table import Table

NAMED = "validation_loss/"  # before the name of a validation set


@dataclass(frozen=True, repr=False)
class Result:
    """The end of a run. Losses are means per token in nats."""

    name: str
    run_dir: str
    status: Literal["complete", "stopped"]
    step: int  # committed steps
    steps: int  # that were asked for
    checkpoint: str | None  # the newest generation
    metrics: Table = field(default_factory=Table)  # one for each committed step
    validation_loss: float | None = None
    validation_losses: dict[str, float] = field(
        default_factory=dict
    )  # by the names of validation sets, if they have any
    unigram_entropy: float | None = None  # of the training text: what counting tokens alone achieves
    continuation: str | None = None  # of evaluate.prompt, greedy
    restarts: int = 0
    interrupted_by: int | None = None  # the signal that stopped it, where one did

    @property
    def final_loss(self) -> float | None:
        """Training loss of the last step."""
        return self.metrics[-1]["loss"] if self.metrics else None

    @property
    def losses(self) -> list[float | None]:
        """Training loss of each step; None where it was not finite."""
        return self.metrics.column("loss") if self.metrics else []

    def to_pandas(self) -> Any:
        """The metrics as a pandas DataFrame. Raises ImportError without pandas."""
        return self.metrics.to_pandas()

    def rows(self) -> Iterator[tuple[str, str | None]]:
        """What there is to say, as names and values."""
        yield "steps", f"{self.step} of {self.steps}"
        yield "loss", _number(self.final_loss)
        yield "validation loss", _number(self.validation_loss)
        for name, loss in self.validation_losses.items():
            yield f"  {name}", _number(loss)
        yield "unigram entropy", _number(self.unigram_entropy)
        yield "checkpoint", self.checkpoint
        yield "restarts", str(self.restarts) if self.restarts else None

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.status}"]
        return "\n".join([*lines, *(f"  {name:<16} {value}" for name, value in self.rows() if value is not None)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        curve = loss_curve(self.metrics, self.unigram_entropy)
        return page(f"{self.name}: {self.status}", list(self.rows()), curve)


def read_result(
    name: str, run_dir: Path | str, steps: int, checkpoint: str | None, step: int, stopped: bool = False
) -> Result:
    """The result of a run as its directory tells it; `step` is that of the checkpoint."""
    run_dir = Path(run_dir)
    events = read_records(run_dir / "events.jsonl")
    last = _last_of(events)
    return Result(
        name=name,
        run_dir=str(run_dir),
        status="stopped" if stopped or step < steps else "complete",
        step=step,
        steps=steps,
        checkpoint=checkpoint,
        metrics=Table(record for record in read_records(run_dir / "metrics.jsonl") if record["step"] <= step),
        validation_loss=last("evaluate", "validation_loss"),
        validation_losses=_named_losses(events),
        unigram_entropy=last("data", "unigram_entropy"),
        continuation=last("continuation", "text"),
        restarts=sum(record["event"] == "restart" for record in events),
    )


def _last_of(events: list[Record]) -> Callable[[str, str], Any]:
    def last(kind: str, key: str) -> Any:
        return next((e[key] for e in reversed(events) if e["event"] == kind and key in e), None)

    return last


def _named_losses(events: list[Record]) -> dict[str, float]:
    """Of the last evaluation, the loss of each validation set that has a name."""
    last = next((e for e in reversed(events) if e["event"] == "evaluate"), {})
    return {key.removeprefix(NAMED): loss for key, loss in last.items() if key.startswith(NAMED)}


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
