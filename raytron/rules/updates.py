"""Rules of a step's batch and its update: micro-batches, learning rate, optimizer, precision, determinism."""

from __future__ import annotations

from collections.abc import Iterator

from raytron.config import RunConfig
from raytron.errors import Problem
from raytron.rules.ranges import RANGES
from raytron.rules.rule import Rule
from raytron.rules.words import around, as_yaml, counted


def _batch(config: RunConfig) -> Iterator[Problem]:
    micro, dp, batch = config.micro_batch_size, config.mesh.dp, config.global_batch_size
    if batch % micro:
        what = f"{counted(batch, 'sequences')} cannot be cut in micro-batches of {micro}"
        yield Problem("global_batch_size", what, f"use {around(batch, micro)}")
    elif batch < micro * dp:
        what = f"{batch} sequences in micro-batches of {micro} do not give each of {dp} data-parallel ranks one"
        smaller = ", or a smaller micro_batch_size" if batch >= dp else ""
        yield Problem(
            "global_batch_size", what, f"use {micro * dp} or more, or mesh.dp of at most {batch // micro}{smaller}"
        )


def _at_once(config: RunConfig) -> Iterator[Problem]:
    if not config.optimizer.at_once:
        return
    if config.optimizer.clip_norm is not None:
        what = "an update at once does not wait for the gradient norm that optimizer.clip_norm limits"
        yield Problem("optimizer.clip_norm", what, "use null, or set optimizer.at_once to false")
    if config.precision.dtype == "fp16":
        what = "fp16 gradients overflow now and then, and each time an update at once would be made in vain"
        yield Problem("optimizer.at_once", what, "use false, or precision.dtype bf16")
    if config.determinism == "canonical":
        what = "determinism: canonical waits for the largest gradient of all ranks at every step"
        yield Problem("optimizer.at_once", what, "use false, or set determinism to mesh")
    for key, value, plain in (
        ("guard.on_nonfinite", config.guard.on_nonfinite, "skip"),
        ("guard.on_spike", config.guard.on_spike, "keep"),
    ):
        if value != plain:
            what = "where ranks update at once a step is not run again, so no policy can follow from it"
            yield Problem(key, what, f"use {plain}, or set optimizer.at_once to false")


def _canonical(config: RunConfig) -> Iterator[Problem]:
    if config.determinism != "canonical":
        return
    if config.cluster.threads_per_worker is None:
        what = "determinism: canonical needs one number of threads, which sums in matrix products depend on"
        yield Problem("cluster.threads_per_worker", what, "use 1, or another number that stays the same")
    if config.data_parallel.reduce_dtype != "fp32":
        what = "sums that are rounded on their way depend on which rank made them, against determinism: canonical"
        yield Problem("data_parallel.reduce_dtype", what, "use fp32, or set determinism to mesh")
    if config.data_parallel.reduce is not None:
        what = "determinism: canonical keeps its sums to the end of a step, whatever is asked for"
        yield Problem("data_parallel.reduce", what, "leave it at null, or set determinism to mesh")
    for axis in ("ep", "etp"):
        if getattr(config.mesh, axis) > 1:
            what = "ranks that share out experts add up tokens of several micro-batches, against determinism: canonical"
            yield Problem(f"mesh.{axis}", what, "use 1, or set determinism to mesh")


def _learning_rate(config: RunConfig) -> Iterator[Problem]:
    rate = config.lr
    if rate.warmup_steps and rate.warmup_steps >= config.lr_horizon:
        horizon = counted(config.lr_horizon, "steps")
        what = f"a warmup of {counted(rate.warmup_steps, 'steps')} leaves nothing of the {horizon} of the learning rate"
        remedy = (
            f"use at most {config.lr_horizon - 1}, or raise {'steps' if rate.decay_steps is None else 'lr.decay_steps'}"
        )
        yield Problem("lr.warmup_steps", what, remedy)
    if rate.decay in ("cosine", "linear", "wsd") and rate.final > rate.peak:
        yield Problem("lr.final", f"{rate.final:g} is above the peak {rate.peak:g}", f"use at most {rate.peak:g}")


def _learning_rate_changes(config: RunConfig) -> Iterator[Problem]:
    before = -1
    for number, change in enumerate(config.lr.changes):
        where = f"lr.changes[{number}]"
        if change.start_step is None:
            yield Problem(where, "does not say when it begins", "set start_step")
            continue
        if change.start_step <= before:
            what = f"{change.start_step} is not after {max(0, before)}, where the change before it begins"
            remedy = "order changes by their beginning, 0 or later"
            yield Problem(f"{where}.start_step", what if before >= 0 else f"{change.start_step} is too small", remedy)
        before = max(before, change.start_step)
        if not change.given:
            yield Problem(where, "changes nothing", "give peak, final, decay, decay_steps or stable_fraction")
        wrong = [
            problem._replace(where=f"{where}.{key}")
            for rule in RANGES
            for key, value in change.given.items()
            if rule.key == f"lr.{key}"
            for problem in rule.check(value)
        ]
        yield from wrong
        rate = config.lr.at(change.start_step)
        horizon = rate.decay_steps or config.steps
        if wrong:
            continue
        if rate.decay in ("cosine", "linear", "wsd") and rate.final > rate.peak:
            what = f"the peak {rate.peak:g} is below the final rate {rate.final:g}"
            yield Problem(f"{where}.peak", what, f"give final, too, of at most {rate.peak:g}")
        if rate.warmup_steps >= horizon:
            what = f"{counted(horizon, 'steps')} are over before the warmup of {rate.warmup_steps}"
            yield Problem(f"{where}.decay_steps", what, f"use at least {rate.warmup_steps + 1}")
        if change.stable_fraction is not None and rate.decay != "wsd":
            what = f"{change.stable_fraction:g} has no effect with other decays than wsd"
            yield Problem(f"{where}.stable_fraction", what, "leave it out, or set decay to wsd")


def _parameter_groups(config: RunConfig) -> Iterator[Problem]:
    for index, group in enumerate(config.optimizer.groups):
        where = f"optimizer.groups[{index}]"
        if group.lr < 0:
            yield Problem(f"{where}.lr", f"{group.lr:g} is too small", "use 0 or more")
        if group.weight_decay is not None and group.weight_decay < 0:
            yield Problem(f"{where}.weight_decay", f"{group.weight_decay:g} is too small", "use 0 or more, or null")
        for key, value, neutral in (("lr", group.lr, 1), ("weight_decay", group.weight_decay, None)):
            if group.freeze and value != neutral:
                what = f"{value:g} has no effect on parameters that are frozen"
                yield Problem(f"{where}.{key}", what, f"leave it at {as_yaml(neutral)}, or set freeze to false")
        earlier = [other.match for other in config.optimizer.groups[:index]]
        if group.match in earlier or "*" in earlier:
            first = "*" if "*" in earlier else group.match
            what = f"{group.match!r} comes after {first!r}, which matches all of it"
            yield Problem(f"{where}.match", what, "put it first: the first group that matches a name holds")


def _rounding(config: RunConfig) -> Iterator[Problem]:
    precision = config.precision
    if precision.stochastic_rounding and "bf16" not in (precision.dtype, precision.moments):
        what = "nothing is rounded to bf16"
        yield Problem("precision.stochastic_rounding", what, "use false, or bf16 for precision.dtype or moments")


def _gradient_noise(config: RunConfig) -> Iterator[Problem]:
    if not config.observe.gradient_noise:
        return
    if config.mesh.dp == 1:
        what = "the noise is seen between data-parallel ranks, and there is one"
        yield Problem("observe.gradient_noise", what, "use false, or mesh.dp of 2 or more")
    if config.data_parallel.reduces_each:
        what = "where each micro-batch's gradients are reduced, no rank ever holds its own gradient of the whole step"
        remedy = "use false, or data_parallel.zero of 0 or 1, or ZeRO 3 with data_parallel.reduce: last_microbatch"
        yield Problem("observe.gradient_noise", what, remedy)
    if config.determinism == "canonical":
        what = "determinism: canonical sums micro-batches by its own tree, and no rank its own gradient"
        yield Problem("observe.gradient_noise", what, "use false, or determinism: mesh")
    if config.mesh.cp > 1:
        what = "context-parallel ranks see parts of the same sequences"
        yield Problem("observe.gradient_noise", what, "use false, or mesh.cp of 1")


# the keys that a relation reads, and the relation
RULES: tuple[Rule, ...] = (
    ("global_batch_size micro_batch_size mesh.dp", _batch),
    (
        "optimizer.at_once optimizer.clip_norm precision.dtype determinism guard.on_nonfinite guard.on_spike",
        _at_once,
    ),
    ("", _canonical),
    ("steps lr.peak lr.final lr.warmup_steps lr.decay_steps lr.decay", _learning_rate),
    (
        "steps lr.peak lr.final lr.warmup_steps lr.decay_steps lr.decay lr.stable_fraction lr.changes",
        _learning_rate_changes,
    ),
    ("optimizer.groups", _parameter_groups),
    ("precision.dtype precision.moments precision.stochastic_rounding", _rounding),
    ("observe.gradient_noise mesh.dp mesh.cp data_parallel.zero data_parallel.reduce determinism", _gradient_noise),
)
