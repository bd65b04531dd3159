"""Rules within a model: heads, positions, experts."""

from __future__ import annotations

from collections.abc import Iterator

from raytron.config import RunConfig, divisors
from raytron.errors import Problem
from raytron.rules.rule import Rule
from raytron.rules.words import any_of, counted, divided


def _head_width(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if model.head_dim is None and model.hidden % model.heads:
        legal = any_of(divisors(model.hidden), model.heads)
        what = divided(model.hidden, "hidden channels", model.heads) + ", one for each head"
        yield Problem("model.heads", what, f"use {legal}, or set model.head_dim")


def _kv_heads(config: RunConfig) -> Iterator[Problem]:
    heads, kv_heads = config.model.heads, config.model.num_kv_heads
    if heads % kv_heads:
        what = f"{heads} heads cannot share {kv_heads} KV heads equally"
        yield Problem("model.kv_heads", what, f"use {any_of(divisors(heads), kv_heads)}")


def _rotary(config: RunConfig) -> Iterator[Problem]:
    width = config.model.dim_per_head
    if config.model.positions == "rope" and width % 2:
        near = any_of([n for n in (width - 1, width + 1) if n > 0], width)
        what = f"rotary positions turn pairs of channels, and a head has {width}"
        yield Problem("model.head_dim", what, f"use {near}, or other positions than rope")


def _positions(config: RunConfig) -> Iterator[Problem]:
    rows = config.model.max_positions
    if config.model.positions != "learned":
        return
    if config.sequence_length > rows:
        what = f"{config.sequence_length} tokens are more than the {rows} learned positions"
        remedy = f"use at most {rows}, or set model.max_positions to {config.sequence_length}"
        yield Problem("sequence_length", what, remedy)
    if config.evaluate.prompt is not None and config.evaluate.prompt_tokens >= rows:
        what = f"{config.evaluate.prompt_tokens} tokens and a prompt are more than the {rows} learned positions"
        yield Problem("evaluate.prompt_tokens", what, f"use less than {rows}")


def _expert_choice(config: RunConfig) -> Iterator[Problem]:
    experts = config.model.experts
    if experts.count == 0:
        return
    if experts.count % experts.groups:
        what = divided(experts.count, "experts", experts.groups)
        yield Problem("model.experts.groups", what, f"use {any_of(divisors(experts.count), experts.groups)}")
        return
    if experts.group_top_k > experts.groups:
        what = f"{experts.group_top_k} of {counted(experts.groups, 'groups')} cannot be chosen"
        yield Problem("model.experts.group_top_k", what, f"use at most {experts.groups}")
        return
    choice = experts.group_top_k * (experts.count // experts.groups)
    if experts.top_k > choice:
        each = experts.count // experts.groups
        of = f", {counted(experts.group_top_k, 'groups')} of {each}" if experts.groups > 1 else ""
        what = f"a token cannot go to {experts.top_k} of {counted(choice, 'experts')}{of}"
        alone = " with model.experts.normalize false" if choice == 1 and experts.normalize else ""
        wider = f", or raise model.experts.group_top_k to {-(-experts.top_k // each)}"
        more = wider if choice < experts.top_k <= experts.count and experts.groups > 1 else ""
        yield Problem("model.experts.top_k", what, f"use at most {choice}{alone}{more}")
    elif experts.top_k == 1 and experts.normalize:
        what = "a token's only expert weighs 1 whatever the router says, which then learns nothing from the loss"
        more = ", or set model.experts.top_k to 2 or more" if choice > 1 else ""
        yield Problem("model.experts.normalize", what, f"use false{more}")
    if experts.drop != "probability" and experts.capacity_factor is None:
        what = "nothing is dropped where experts have no capacity"
        yield Problem("model.experts.drop", what, "use probability, or set model.experts.capacity_factor")
    if experts.shared_gate and not experts.shared_ffn:
        what = "there is no shared expert for the gate to weigh"
        yield Problem("model.experts.shared_gate", what, "use false, or set model.experts.shared_ffn")


def _expert_layers(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if model.experts.count == 0:
        return
    if model.expert_layers == 0:
        first, every = model.experts.first_dense, model.experts.every
        layers = counted(model.layers, "layers")
        what = f"none of {layers} has experts, {first} being dense at first and then {every - 1} of {every}"
        if first >= model.layers >= every:
            yield Problem("model.experts.first_dense", what, f"use at most {model.layers - every}")
        elif first >= model.layers:
            remedy = f"use at most {model.layers}, and 0 for model.experts.first_dense"
            yield Problem("model.experts.every", what, remedy)
        else:
            yield Problem("model.experts.every", what, f"use at most {model.layers - first}")
    if model.bias:
        yield Problem("model.bias", "experts have no biases", "use false, or set model.experts.count to 0")


_HEADS = "model.hidden model.heads model.kv_heads model.head_dim"

# the keys that a relation reads, and the relation
RULES: tuple[Rule, ...] = (
    ("model.hidden model.heads model.head_dim", _head_width),
    ("model.heads model.kv_heads", _kv_heads),
    (f"{_HEADS} model.positions", _rotary),
    ("sequence_length model.max_positions model.positions evaluate.prompt_tokens", _positions),
    (
        "model.experts.count model.experts.top_k model.experts.groups model.experts.group_top_k "
        "model.experts.normalize model.experts.drop model.experts.capacity_factor model.experts.shared_gate "
        "model.experts.shared_ffn",
        _expert_choice,
    ),
    ("model.layers model.experts.count model.experts.first_dense model.experts.every model.bias", _expert_layers),
)
