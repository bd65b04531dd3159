"""Rules of the data: sources, blends and their stages, validation sets, objectives."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from raytron.config import RunConfig
from raytron.errors import Problem
from raytron.rules.rule import Rule
from raytron.rules.words import counted


def _data(config: RunConfig) -> Iterator[Problem]:
    data, vocab = config.data, config.model.vocab
    if data.dataset is not None or data.blend:
        return
    if not data.sources:
        yield Problem("data.sources", "no data set and no sources", "name files, or python-stdlib, or set data.dataset")
    if data.tokenizer.path is None and data.tokenizer.vocab > vocab:
        what = f"a tokenizer of {data.tokenizer.vocab} tokens makes ids beyond the model's vocabulary of {vocab}"
        remedy = f"use at most {vocab}, or set model.vocab to {data.tokenizer.vocab}"
        yield Problem("data.tokenizer.vocab" if vocab >= 257 else "model.vocab", what, remedy)


WEIGHTS_SUM = 1e-3  # how far from 1 weights may be, for they are written by hand


LEAST_SHARE = 1 + 1e-6  # samples of a block that a source has at least, with room for rounding


def _blend(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if not data.blend:
        return
    if data.dataset is not None:
        what = "a run reads one data set or a blend, and data.dataset names one"
        yield Problem(
            "data.blend", what, "set data.dataset to null and name it in data.blend, or leave data.blend empty"
        )
    for number, source in enumerate(data.blend):
        where = f"data.blend[{number}]"
        if not source.dataset.strip() and not source.sources:
            yield Problem(f"{where}.dataset", "is empty", "name the folder of a tokenized data set, or text in sources")
        if source.dataset.strip() and source.sources:
            what = "names a tokenized data set and text, which is tokenized as it is read"
            yield Problem(where, what, "leave dataset or sources empty")
        if source.max_epochs is not None and source.max_epochs <= 0:
            yield Problem(f"{where}.max_epochs", f"{source.max_epochs:g} is too small", "use more than 0, or null")
        late = any(number < len(stage.weights) and stage.weights[number] > 0 for stage in data.stages)
        if source.weight == 0 and not late:
            yield Problem(f"{where}.weight", "is 0 in every stage: it is never read", "give it a weight, or remove it")
    yield from _weights("data.blend", [source.weight for source in data.blend], data.blend_block)


def _weights(where: str, weights: Sequence[float], block: int) -> Iterator[Problem]:
    """Shares of samples: not negative, together 1, and enough for whole samples in a block."""
    if min(weights, default=0) < 0:
        yield Problem(where, f"a weight of {min(weights):g} is too small", "use 0 or more")
        return
    total = sum(weights)
    if abs(total - 1) > WEIGHTS_SUM:
        normal = ", ".join(f"{weight / total:.6g}" for weight in weights) if total > 0 else "weights that sum to 1"
        yield Problem(where, f"the weights sum to {total:g}, not to 1", f"use {normal}")
        return
    for number, weight in enumerate(weights):
        share = weight / total
        if 0 < share * block < LEAST_SHARE:
            larger = 1 << math.ceil(math.log2(LEAST_SHARE / share))
            what = f"the weight {weight:g} of source {number} is less than one sample in a block of {block}"
            bigger = f", or data.blend_block of {larger}" if larger <= 1 << 20 else ""
            yield Problem(where, what, f"use 0, or at least {math.ceil(LEAST_SHARE / block * 1e7) / 1e7:g}{bigger}")


def _text(config: RunConfig) -> Iterator[Problem]:
    """What text that is tokenized as it is read does not go with."""
    data = config.data
    if data.source == "text" and data.dataset is not None:
        what = "text is tokenized as it is read, and data.dataset names a data set that is tokenized already"
        yield Problem("data.source", what, "set data.dataset to null, or data.source to tokens")
    if data.source == "text" and data.blend:
        remedy = "use tokens, and name the text in `sources` of an entry of data.blend"
        yield Problem("data.source", "each entry of a blend says for itself whether it is text", remedy)
        return
    if not data.reads_text:
        return
    before = "or set data.source to tokens" if not data.blend else "or tokenize the text first (raytron tokenize)"
    if data.packing == "best_fit":
        what = (
            "best_fit packs documents by their tokens, which text that is tokenized as it is read does not tell before"
        )
        yield Problem("data.packing", what, f"use chop or pad, {before}")
    if data.packing == "pad" and data.too_long == "drop":
        what = "which documents are too long is not known before their text is tokenized"
        yield Problem("data.too_long", what, f"use cut, {before}")
    if data.format != "text" and not data.blend:
        what = f"{data.format} becomes tokens and loss spans of whole conversations, which only a data set keeps"
        yield Problem("data.format", what, f"use text, {before}")
    if data.blend and data.tokenizer.path is None:
        what = "text in a blend is tokenized as it is read, and no tokenizer is given"
        yield Problem("data.tokenizer.path", what, "give that of the other entries, such as DATASET/tokenizer.json")


def _data_stages(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if not data.blend:
        return
    before = 0
    for number, stage in enumerate(data.stages):
        where = f"data.stages[{number}]"
        starts = [start for start in (stage.start_step, stage.start_sample) if start is not None]
        if len(starts) != 1:
            what = "names both a step and a sample" if starts else "does not say when it begins"
            yield Problem(where, what, "set one of start_step and start_sample")
            continue
        key = "start_step" if stage.start_sample is None else "start_sample"
        start = config.samples_after(starts[0]) if key == "start_step" else starts[0]
        if start <= before:
            what = f"begins with sample {start}, and the stage before it with sample {before}"
            yield Problem(f"{where}.{key}", what, "order stages by their beginning, which is after the first sample")
        before = max(before, start)
        if len(stage.weights) != len(data.blend):
            what = f"{counted(len(stage.weights), 'weights')} for {counted(len(data.blend), 'entries')} of data.blend"
            yield Problem(f"{where}.weights", what, "give one for each, 0 for a source that is not read")
        else:
            yield from _weights(f"{where}.weights", stage.weights, data.blend_block)


def _validation_sets(config: RunConfig) -> Iterator[Problem]:
    names = [each.name for each in config.data.validation]
    for number, each in enumerate(config.data.validation):
        where = f"data.validation[{number}]"
        if not re.fullmatch(r"[\w.-]+", each.name):
            remedy = "use letters, digits, and . _ - only: losses are told by it"
            yield Problem(f"{where}.name", f"{each.name!r} is no name", remedy)
        elif each.name in names[:number]:
            yield Problem(f"{where}.name", f"{each.name!r} is taken", "give each validation set a name of its own")
        if not each.dataset.strip():
            yield Problem(f"{where}.dataset", "is empty", "name the folder of a tokenized data set")


def _objective(config: RunConfig) -> Iterator[Problem]:
    wanted = config.data.objective
    if wanted != "causal":
        what = f"{wanted} asks for attention to both sides; the models here are causal decoders"
        module = {"masked": "raytron.data.masked", "span_corruption": "raytron.data.corruption"}[wanted]
        yield Problem("data.objective", what, f"use causal, or make such samples for another model with {module}")
    if config.data.format == "preference":
        what = "a causal model would learn the rejected side of each pair like the chosen one"
        yield Problem("data.format", what, "train on text or chat; raytron tokenize makes data sets of pairs")


def _fill_in_the_middle(config: RunConfig) -> Iterator[Problem]:
    fim = config.data.fim
    names = [fim.prefix, fim.middle, fim.suffix]
    if fim.rate > 0 and len(set(names)) < len(names):
        what = f"the tokens before prefix, middle and suffix are not three: {', '.join(names)}"
        yield Problem("data.fim", what, "name three tokens that the tokenizer has")
    if fim.rate > 0 and config.data.dataset is None and config.data.tokenizer.path is None:
        what = f"a tokenizer that is trained on the corpus has no tokens {', '.join(names)}"
        yield Problem("data.fim.rate", what, "use 0, or set data.tokenizer.path to a tokenizer that has them")


def _metadata(config: RunConfig) -> Iterator[Problem]:
    data, keys = config.data, config.data.metadata_keys
    told = {"text": (data.text_key,), "chat": (data.messages_key,), "preference": ("prompt", "chosen", "rejected")}
    for name in told[data.format]:
        if name in keys:
            what = f"{name!r} holds the text, which becomes tokens"
            yield Problem("data.metadata_keys", what, "leave it out")
    if len(set(keys)) < len(keys) or not all(key.strip() for key in keys):
        yield Problem("data.metadata_keys", "a name is empty or there twice", "name each field once")


# the keys that a relation reads, and the relation
RULES: tuple[Rule, ...] = (
    ("data.sources data.dataset data.tokenizer.path data.tokenizer.vocab model.vocab", _data),
    ("data.blend data.blend_block data.stages data.dataset", _blend),
    ("data.source data.dataset data.blend data.packing data.too_long data.format data.tokenizer.path", _text),
    (
        "data.blend data.blend_block data.stages steps global_batch_size batch_ramp.start batch_ramp.increment "
        "batch_ramp.samples",
        _data_stages,
    ),
    ("data.validation", _validation_sets),
    ("data.objective", _objective),
    (
        "data.fim.rate data.fim.prefix data.fim.middle data.fim.suffix data.dataset data.tokenizer.path",
        _fill_in_the_middle,
    ),
    ("data.metadata_keys data.format data.text_key data.messages_key", _metadata),
)
