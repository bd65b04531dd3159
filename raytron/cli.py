"""The command line. Each command fetches what it needs when it runs, so `raytron plan` imports neither torch nor Ray.

Exit codes: 0 done; 1 failed; 2 the configuration has problems (all are printed, before Ray starts); 130 stopped by Ctrl-C,
143 by SIGTERM, after a checkpoint unless asked twice.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from raytron import __version__, presets
from raytron.config import RunConfig, parse_overrides
from raytron.errors import ConfigError, RaytronError

LAZY = {
    "train": ("raytron.actors.run", "train"),
    "tokenize": ("raytron.actors.run", "tokenize"),
    "attach": ("raytron.actors.run", "attach"),
    "statuses": ("raytron.actors.run", "statuses"),
    "plan": ("raytron.plan.plan", "make_plan"),
    "elastic page": ("raytron.plan.losses", "page"),
    "paper cluster": ("raytron.plan.cluster", "on_paper"),
    "picture": ("raytron.plan.draw", "schedule_svg"),
    "times": ("raytron.plan.times", "read_times"),
    "traces": ("raytron.plan.trace", "read_trace"),
    "merge traces": ("raytron.plan.trace", "merge"),
    "simulated events": ("raytron.plan.trace", "simulated_events"),
    "trace file": ("raytron.plan.trace", "document"),
    "is data set": ("raytron.data.shards", "holds_dataset"),
    "is text": ("raytron.data.text_index", "holds_text"),
    "data page": ("raytron.data.describe", "describe"),
    "sample page": ("raytron.data.sample_page", "describe_sample"),
    "checkpoint page": ("raytron.checkpoint.describe", "describe"),
    "generate": ("raytron.training.generate", "generate"),
    "upcycle": ("raytron.training.upcycle", "upcycle"),
    "import megatron-data": ("raytron.data.megatron", "import_megatron"),
    "export megatron-data": ("raytron.data.megatron", "export_megatron"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = _parser()
    given, late = parser.parse_known_args(arguments)
    if late and ("overrides" not in given or any(text.startswith("-") for text in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:  # overrides after an option
        given.overrides += late
    try:
        return int(given.command(given))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except RaytronError as error:
        print(f"raytron: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("raytron: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def train(given: argparse.Namespace) -> int:
    result = lazy("train")(_config(given))
    print(result)
    return 0 if result.interrupted_by is None else 128 + int(result.interrupted_by)


def plan(given: argparse.Namespace) -> int:
    config = _config(given)
    times = None if given.times is None else lazy("times")(Path(given.times), config)
    cluster = None if given.on is None else lazy("paper cluster")(given.on)
    made = lazy("plan")(config, cluster, times, lambda text: print(text, file=sys.stderr))
    print(made)
    if config.elastic.on:
        print(f"\n{lazy('elastic page')(made, times)}")
    if given.svg is not None:
        _write(Path(given.svg), lazy("picture")(made.schedule))
    if given.trace is not None:
        events = lazy("simulated events")(made.schedule, made.timeline)
        _write(Path(given.trace), lazy("trace file")(events))
    return 0


def trace(given: argparse.Namespace) -> int:
    directory = Path(given.run)
    events, compared = lazy("merge traces")(lazy("traces")(directory))
    path = Path(given.out) if given.out is not None else directory / "trace" / "trace.json"
    _write(path, lazy("trace file")(events))
    print(f"{path}: open it in https://ui.perfetto.dev")
    for step in compared:
        print(step)
    return 0


def tokenize(given: argparse.Namespace) -> int:
    told = [""]

    def report(_fraction: float, message: str) -> None:
        if message != told[0]:
            told[0] = message
            print(message, flush=True)

    print(lazy("data page")(lazy("tokenize")(_config(given), report)))
    return 0


def inspect(given: argparse.Namespace) -> int:
    if given.sample is not None:
        print(lazy("sample page")(given.path, given.sample, given.sequence_length, given.seed))
        return 0
    page = "data page" if lazy("is text")(given.path) or lazy("is data set")(given.path) else "checkpoint page"
    print(lazy(page)(given.path, verify=given.verify))
    return 0


def generate(given: argparse.Namespace) -> int:
    print(given.prompt + lazy("generate")(given.checkpoint, given.prompt, given.tokens))
    return 0


def upcycle(given: argparse.Namespace) -> int:
    print(lazy("upcycle")(given.checkpoint, _config(given)))
    return 0


def import_(given: argparse.Namespace) -> int:
    made = lazy(f"import {given.kind}")(
        given.source,
        given.directory,
        given.tokenizer,
        given.eod,
        pattern=given.pattern,
        validation_fraction=given.validation_fraction,
    )
    print(lazy("data page")(made.path))
    return 0


def export(given: argparse.Namespace) -> int:
    for path in lazy(f"export {given.kind}")(given.dataset, given.target):
        print(path)
    return 0


def status(given: argparse.Namespace) -> int:
    found = lazy("statuses")(given.run, given.address)
    if given.json:
        print(json.dumps(found if given.run is None else found[0]))
    else:
        pages = ["\n".join(f"{key:<16} {_shown(value)}" for key, value in facts.items()) for facts in found]
        print("\n\n".join(pages) or "no run is at work on this cluster")
    return 0


def stop(given: argparse.Namespace) -> int:
    run = lazy("attach")(given.run, given.address)
    try:
        run.stop()
        print(f"{run.name} saves a checkpoint and stops")
        if given.wait:
            print(run.wait())
    finally:
        run.close()
    return 0


def pause(given: argparse.Namespace) -> int:
    return _steer(given, lambda run: run.pause(), "pauses after the step that is under way")


def resume(given: argparse.Namespace) -> int:
    return _steer(given, lambda run: run.resume(), "goes on")


def set_lr(given: argparse.Namespace) -> int:
    keys = parse_overrides(given.overrides)
    return _steer(given, lambda run: run.set_lr(**keys), "has another learning rate from its next step on")


def _steer(given: argparse.Namespace, ask: Callable[[Any], None], what: str) -> int:
    run = lazy("attach")(given.run, given.address)
    try:
        ask(run)
        print(f"{run.name} {what}")
    finally:
        run.close()
    return 0


def remesh(given: argparse.Namespace) -> int:
    run = lazy("attach")(given.run, given.address)
    try:
        print(run.remesh(**parse_overrides(given.overrides)))
    finally:
        run.close()
    return 0


def lazy(name: str) -> Callable[..., Any]:
    """What a command needs from another module."""
    module, attribute = LAZY[name]
    found: Callable[..., Any] = getattr(import_module(module), attribute)
    return found


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    """Raises RaytronError where the file can't be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RaytronError(f"{path} can't be written: {error.strerror}") from None


def _config(given: argparse.Namespace) -> RunConfig:
    """The configuration of a file or a preset, with overrides. Raises ConfigError."""
    return presets.read(str(given.config), given.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raytron", description="Trains transformers on a Ray cluster with actors.")
    parser.add_argument("--version", action="version", version=f"raytron {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(command.__name__.rstrip("_").replace("_", "-"), help=text, description=text)
        made.set_defaults(command=command)
        return made

    for command, text in (
        (train, "train a model, or go on from its newest checkpoint"),
        (plan, "show what a run would do: mesh, stages, schedule, bytes, FLOPs"),
        (tokenize, "prepare the data set of a run"),
    ):
        made = add(command, text)
        made.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a preset")
        made.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. mesh.tp=2 steps=50")
        if command is plan:
            made.add_argument("--on", metavar="HARDWARE", help="hardware on paper, e.g. 512xH100 or 64xA100:4")
            made.add_argument("--svg", metavar="FILE", help="also draw the schedule into an SVG file")
            made.add_argument(
                "--trace", metavar="FILE", help="also write the simulation as a Chrome trace, for Perfetto"
            )
            made.add_argument("--times", metavar="RUN_DIR", help="simulate with the times that a run has measured")
    made = add(inspect, "show a checkpoint, a run directory or a data set")
    made.add_argument("path", metavar="CHECKPOINT|DATASET|RUN_DIR")
    made.add_argument("--verify", action="store_true", help="also read and check every byte")
    made.add_argument(
        "--sample", type=int, metavar="ID", help="show one training sample of a run directory or a data set"
    )
    made.add_argument("--sequence-length", type=int, metavar="TOKENS", help="of a data set's samples")
    made.add_argument("--seed", type=int, default=0, help="of the order of a data set's samples")
    made = add(trace, "join the timelines that a run's ranks recorded, and compare them with the simulation")
    made.add_argument("run", metavar="RUN_DIR")
    made.add_argument("--out", metavar="FILE", help="else RUN_DIR/trace/trace.json")
    made = add(generate, "continue a prompt greedily")
    made.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or a run directory")
    made.add_argument("--prompt", required=True)
    made.add_argument("--tokens", type=int, default=32)
    made = add(upcycle, "make step 0 of a mixture of experts from a dense checkpoint")
    made.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or a run directory")
    made.add_argument("config", metavar="CONFIG", help="of the run to make: a YAML file, or the name of a preset")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. model.experts.count=8")
    made = add(import_, "make a data set from files of another library")
    made.add_argument("kind", choices=["megatron-data"])
    made.add_argument("source", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    made.add_argument("directory", metavar="DIRECTORY", help="of the data set: empty, or not there yet")
    made.add_argument("--tokenizer", required=True, metavar="FILE", help="that made the token ids, or the word byte")
    made.add_argument("--eod", default="<|endoftext|>", metavar="TOKEN", help="its token that ends a document")
    made.add_argument("--pattern", metavar="NAME", help="how tiktoken's ranks cut text, e.g. cl100k")
    made.add_argument("--validation-fraction", type=float, default=0.02, metavar="SHARE", help="of the documents")
    made = add(export, "write a data set as files of another library")
    made.add_argument("kind", choices=["megatron-data"])
    made.add_argument("dataset", metavar="DATASET")
    made.add_argument(
        "target", metavar="PREFIX", help="of PREFIX-train.bin and .idx, and PREFIX-validation.bin and .idx"
    )
    for command, text, example in (
        (status, "show where a run, or every run, stands", None),
        (stop, "make a run save and stop", None),
        (pause, "make a run wait after the step that is under way, its workers ready", None),
        (resume, "let a paused run go on", None),
        (set_lr, "give a run at work another learning rate, from its next step on", "peak=1e-4 final=1e-5"),
        (remesh, "give a run at work another mesh, live, from its next step on", "mesh.tp=4 mesh.dp=1"),
    ):
        made = add(command, text)
        run = made.add_argument("run", metavar="RUN", help="the name of a run, or its directory")
        run.nargs = "?" if command is status else None
        made.add_argument("--address", help="of the Ray cluster; else the run directory or RAY_ADDRESS tells")
        if example is not None:
            made.add_argument("overrides", metavar="key=value", nargs="+", help=f"e.g. {example}")
        elif command in (status, stop):
            made.add_argument("--json" if command is status else "--wait", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
