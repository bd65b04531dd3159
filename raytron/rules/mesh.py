"""Rules between a mesh and what is cut over it: heads, channels, the sequence, experts, replicas."""

from __future__ import annotations

import math
from collections.abc import Iterator

from raytron.config import RunConfig, divisors
from raytron.errors import Problem
from raytron.rules.rule import Rule
from raytron.rules.words import any_of, around, counted, divided


def _tp_widths(config: RunConfig) -> list[int]:
    """Every tp that the model and the sequence admit."""
    model, sequence = config.model, config.sequence_length
    return [
        tp
        for tp in divisors(model.heads)
        if _kv_fits(model.num_kv_heads, tp)
        and model.ffn % tp == 0
        and _exchange_fits(config, tp, config.mesh.cp_all_to_all)
        and sequence % _sequence_unit(config, tp, config.mesh.cp_all_to_all) == 0
    ]


def _exchange_fits(config: RunConfig, tp: int, parts: int) -> bool:
    """Whether what tp leaves a rank of the heads can be exchanged for sequence over `parts` ranks."""
    model = config.model
    return model.heads // tp % parts == 0 and _kv_fits(max(1, model.num_kv_heads // tp), parts)


def _sequence_unit(config: RunConfig, tp: int, parts: int) -> int:
    """What divides the length of a sequence: its equal shares, and on a ring two chunks for each rank."""
    mesh = config.mesh
    ring = mesh.cp // parts
    return math.lcm(mesh.cp * (tp if mesh.sequence_parallel else 1), 2 * ring if ring > 1 else 1)


def _kv_fits(kv_heads: int, tp: int) -> bool:
    return kv_heads % tp == 0 or tp % kv_heads == 0


def _tensor_parallel(config: RunConfig) -> Iterator[Problem]:
    model, tp = config.model, config.mesh.tp
    use = f"use {any_of(_tp_widths(config) or [1], tp)}"
    if model.heads % tp:
        yield Problem("mesh.tp", divided(model.heads, "heads", tp), use)
    elif not _kv_fits(model.num_kv_heads, tp):
        what = (
            f"{counted(model.num_kv_heads, 'KV heads')} can neither be cut in {tp} equal parts "
            f"nor repeated equally over {tp} ranks"
        )
        yield Problem("mesh.tp", what, use)
    if model.ffn % tp:
        what = divided(model.ffn, "feed-forward channels", tp)
        more = "" if model.heads % tp else f", or set model.ffn to {around(model.ffn, tp)}"
        yield Problem("mesh.tp", what, f"{use}{more}")


def _sequence(config: RunConfig) -> Iterator[Problem]:
    mesh, length = config.mesh, config.sequence_length
    unit = _sequence_unit(config, mesh.tp, mesh.cp_all_to_all)
    if mesh.cp % mesh.cp_all_to_all or length % unit == 0:
        return
    use = f"use {around(length, unit)}"
    if mesh.cp == 1:
        remedy = f"{use}, or set mesh.sequence_parallel to false"
        yield Problem("sequence_length", divided(length, "tokens", unit) + " under sequence parallelism", remedy)
        return
    ring = mesh.cp // mesh.cp_all_to_all
    cuts = [f"2 chunks for each of {ring} ranks of a ring"] * (ring > 1)
    cuts += [f"{mesh.cp_all_to_all} parts for the all-to-all"] * (mesh.cp_all_to_all > 1)
    cuts += [f"{mesh.tp} shares for sequence parallelism"] * (mesh.sequence_parallel and mesh.tp > 1)
    yield Problem("sequence_length", f"{length} tokens cannot be cut equally: {', '.join(cuts)}", use)


def _all_to_all(config: RunConfig) -> Iterator[Problem]:
    model, mesh = config.model, config.mesh
    parts, tp = mesh.cp_all_to_all, mesh.tp
    if model.heads % tp or not _kv_fits(model.num_kv_heads, tp):
        return
    legal = any_of([n for n in divisors(mesh.cp) if _exchange_fits(config, tp, n)], parts)
    if mesh.cp % parts:
        yield Problem("mesh.cp_all_to_all", divided(mesh.cp, "context-parallel ranks", parts), f"use {legal}")
    elif not _exchange_fits(config, tp, parts):
        heads, kv_heads = model.heads // tp, max(1, model.num_kv_heads // tp)
        share = f"{counted(heads, 'heads')} and {counted(kv_heads, 'KV heads')} of a rank"
        what = f"{share} cannot be exchanged equally over {parts} ranks"
        yield Problem("mesh.cp_all_to_all", what, f"use {legal}; a ring takes the rest of mesh.cp")


def _expert_parallel(config: RunConfig) -> Iterator[Problem]:
    model, mesh = config.model, config.mesh
    if model.experts.count == 0:
        return
    plane = mesh.dp * mesh.cp * mesh.tp
    widths = [etp for etp in divisors(plane) if model.expert_ffn % etp == 0]
    if model.expert_ffn % mesh.etp:
        what = divided(model.expert_ffn, "channels of an expert", mesh.etp)
        yield Problem("mesh.etp", what, f"use {any_of(widths, mesh.etp)}")
    elif plane % (mesh.etp * mesh.replicate):
        ranks = f"{counted(plane, 'ranks')} (dp · cp · tp)"
        what = f"{ranks} cannot be folded with etp {mesh.etp} and replicate {mesh.replicate}"
        legal = [etp for etp in widths if plane % (etp * mesh.replicate) == 0]
        yield Problem("mesh.etp", what, f"use {any_of(legal, mesh.etp)}" if legal else "set mesh.replicate to 1")
    else:
        room = plane // (mesh.etp * mesh.replicate)
        if model.experts.count % mesh.ep or room % mesh.ep:
            legal = [ep for ep in divisors(room) if model.experts.count % ep == 0]
            folds = [name for name in ("etp", "replicate") if getattr(mesh, name) > 1]
            ranks = f"{counted(room, 'ranks')} ({' / '.join(['dp · cp · tp', *folds])})"
            what = f"{counted(model.experts.count, 'experts')} and {ranks} cannot both be cut in {mesh.ep} equal parts"
            yield Problem("mesh.ep", what, f"use {any_of(legal, mesh.ep)}")
    if model.experts.shared_ffn % mesh.tp:
        what = divided(model.experts.shared_ffn, "channels of the shared expert", mesh.tp)
        yield Problem("model.experts.shared_ffn", what, f"use {around(model.experts.shared_ffn, mesh.tp)}")
    local, tp = config.sequence_length // mesh.cp, mesh.tp
    if not mesh.sequence_parallel and local % tp:
        what = f"{divided(local, 'tokens', tp)}, of which each tp rank takes one through the experts"
        yield Problem("sequence_length", what, f"use {around(config.sequence_length, tp * mesh.cp)}")


def _elastic(config: RunConfig) -> Iterator[Problem]:
    elastic, mesh = config.elastic, config.mesh
    least, most, world = elastic.min_workers, elastic.max_workers, mesh.pp * mesh.dp * mesh.cp * mesh.tp
    if least is not None and most is not None and least > most:
        yield Problem("elastic.min_workers", f"{least} is more than max_workers, {most}", f"use at most {most}")
    elif most is not None and world > most:
        what = f"the mesh has {counted(world, 'workers')}, and at most {most} are asked for"
        yield Problem("elastic.max_workers", what, f"use {world} or more, or a smaller mesh")


def _replicas(config: RunConfig) -> Iterator[Problem]:
    dp, replicate = config.mesh.dp, config.mesh.replicate
    if dp % replicate:
        what = divided(dp, "data-parallel ranks", replicate)
        yield Problem("mesh.replicate", what, f"use {any_of(divisors(dp), replicate)}")
    elif replicate > 1 and config.data_parallel.zero == 0:
        what = "ZeRO 0 shares out nothing, so every data-parallel rank is a replica"
        yield Problem("mesh.replicate", what, "use 1, or set data_parallel.zero to 1, 2 or 3")


_HEADS = "model.hidden model.heads model.kv_heads model.head_dim"

# the keys that a relation reads, and the relation
RULES: tuple[Rule, ...] = (
    (
        f"{_HEADS} model.ffn mesh.tp mesh.cp mesh.cp_all_to_all sequence_length mesh.sequence_parallel",
        _tensor_parallel,
    ),
    ("sequence_length mesh.tp mesh.cp mesh.cp_all_to_all mesh.sequence_parallel", _sequence),
    (f"{_HEADS} mesh.tp mesh.cp mesh.cp_all_to_all", _all_to_all),
    (
        "model.experts.count model.experts.ffn model.ffn model.experts.shared_ffn mesh.dp mesh.cp mesh.tp mesh.ep "
        "mesh.etp mesh.replicate mesh.sequence_parallel sequence_length",
        _expert_parallel,
    ),
    ("mesh.dp mesh.replicate data_parallel.zero", _replicas),
    ("mesh.pp mesh.dp mesh.cp mesh.tp elastic.min_workers elastic.max_workers", _elastic),
)
