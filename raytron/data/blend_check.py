"""What can be said about the data sets of a blend, and about validation sets, before Ray is started.

Everything here reads manifests alone (and of text that is tokenized as it is read its index, where it is there): whether
the sets exist, fit the model and each other, hold a sample, and how often the run would read each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raytron.config import RunConfig
from raytron.data.fim import fim_problems
from raytron.data.reader import shortage, size_of
from raytron.data.recipe import Recipe
from raytron.data.run_data import RunData, source_names
from raytron.data.shards import Dataset, open_dataset
from raytron.data.text_index import TextCorpus, text_folder
from raytron.data.text_sources import indexed, resolve_text
from raytron.data.tokenizer import Tokenizer
from raytron.errors import ConfigError, DataError, Problem, RaytronError

SHOWN = 8  # sources of a notice
TOGETHER = "tokenize all of them with one tokenizer.json (data.tokenizer.path)"


def blend_problems(config: RunConfig) -> tuple[list[Problem], list[Dataset | TextCorpus]]:
    """Everything that keeps a run from using its blend; and what it names, as far as it can be opened."""
    found: list[Problem] = []
    given, digest = config.data.tokenizer, None
    try:
        if given.path is not None:
            digest = Tokenizer(given.path, given.eod, given.pattern).sha256
    except RaytronError as error:
        found.append(Problem("data.tokenizer.path", str(error).splitlines()[0], "give a tokenizer.json, or null"))
    opened = [_entry(config, number, found) for number in range(len(config.data.blend))]
    datasets = [dataset for dataset in opened if dataset is not None]
    if len(datasets) < len(opened):
        return found, datasets
    for number, dataset in enumerate(datasets):
        where = f"data.blend[{number}].{'sources' if config.data.blend[number].sources else 'dataset'}"
        misfits = dataset.misfits(vocab=config.model.vocab, tokenizer_sha256=digest)
        found += [problem._replace(where=where, what=f"{dataset.name}: {problem.what}") for problem in misfits]
        found += _unlike(where, dataset, datasets[0], "data.blend[0]") if number else []
        twin = next((n for n, other in enumerate(datasets[:number]) if other.hash == dataset.hash), None)
        if twin is not None:
            what = f"{dataset.name} is the data set of data.blend[{twin}], too, and would be read twice"
            found.append(Problem(where, what, "name it once, with the sum of both weights"))
        short = shortage(config, dataset, "train")
        if short is not None:
            found.append(short._replace(where=where, what=f"{dataset.name}: {short.what}"))
    found += fim_problems(datasets[0].tokenizer, config.data)
    return found or [*_too_often(config, datasets)], datasets


def _entry(config: RunConfig, number: int, found: list[Problem]) -> Dataset | TextCorpus | None:
    """What an entry names, opened; None where it can't be, with the problem in `found`, and where its text is not indexed
    yet."""
    entry, where = config.data.blend[number], f"data.blend[{number}].sources"
    if not entry.sources:
        return _opened(f"data.blend[{number}].dataset", entry.dataset, found)
    try:
        return indexed(config, resolve_text(config.data, entry.sources, where), text_folder(config, number))
    except ConfigError as error:
        found += error.problems
    return None


def validation_problems(config: RunConfig, trained: Sequence[Dataset | TextCorpus]) -> list[Problem]:
    """What keeps a run from using `data.validation`. trained: what it trains on, where that is there."""
    found: list[Problem] = []
    if not config.data.validation:
        return found
    for number, each in enumerate(config.data.validation):
        where = f"data.validation[{number}].dataset"
        dataset = _opened(where, each.dataset, found)
        if dataset is None:
            continue
        if trained:
            found += _unlike(where, dataset, trained[0], "the data to train on")
        if each.split == "train" and dataset.hash in [other.hash for other in trained]:
            what = f"{dataset.name} is trained on, and its train split would be validated on"
            found.append(Problem(f"data.validation[{number}].split", what, "use validation, or another data set"))
        short = shortage(config, dataset, each.split)
        if short is not None:
            found.append(short._replace(where=where, what=f"{dataset.name}: {short.what}"))
    return found


def epochs_read(data: RunData, samples: int) -> list[float]:
    """How often each source is read within the first `samples` samples of a run."""
    taken = data.recipe.order(data.sizes, data.config.seed).taken(samples)
    return [float(count) / size for count, size in zip(taken.tolist(), data.sizes, strict=True)]


def epochs_notice(data: RunData) -> str:
    """In words, how often the run reads its data within the steps that it asks for."""
    config = data.config
    samples = config.samples_after(config.steps)
    tokens = samples * config.sequence_length
    read = epochs_read(data, samples)
    if not config.data.blend:
        return f"{config.steps} steps read {tokens:,} tokens: {_times(read[0])} all there are"
    shown = [f"{name} {times:.3g}" for name, times in zip(source_names(config), read, strict=True)]
    more = [f"and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
    begins = [f"{step_of(config, stage.start):,}" for stage in data.recipe.stages[1:]]
    stages = f"; other weights from step {', '.join(begins)} on" if begins else ""
    return f"{config.steps} steps read {tokens:,} tokens, epochs: {', '.join([*shown[:SHOWN], *more])}{stages}"


def _times(epochs: float) -> str:
    return f"{epochs:.3g} times"


def _opened(where: str, path: str, found: list[Problem]) -> Dataset | None:
    """An opened data set; None, and the problem in `found`, where it can't be opened."""
    try:
        return open_dataset(path)
    except DataError as error:
        carried = error.args[0]
        if isinstance(carried, Problem):
            found.append(Problem(where, f"{carried.where}: {carried.what}", carried.remedy))
        else:
            found.append(Problem(where, str(error), "see above"))
        return None


def _unlike(where: str, dataset: Dataset | TextCorpus, other: Dataset | TextCorpus, name: str) -> Iterator[Problem]:
    """Where ids of one data set mean other tokens than those of another."""
    facts = (
        ("tokenizer", dataset.tokenizer_sha256[:12], other.tokenizer_sha256[:12]),
        ("vocabulary", dataset.vocab, other.vocab),
        ("end of document", dataset.eod, other.eod),
    )
    differ = [f"{what} {one}, not {two}" for what, one, two in facts if one != two]
    if differ:
        yield Problem(where, f"{dataset.name} differs from {name}: {'; '.join(differ)}", TOGETHER)


def _too_often(config: RunConfig, datasets: Sequence[Dataset | TextCorpus]) -> Iterator[Problem]:
    """Each source that the run would read more often than it may, and when. Where documents are packed that is told once
    they are: `raytron.data.ensure` asks again."""
    if any(size_of(config, dataset, "train") is None for dataset in datasets):
        return
    data = RunData(config, tuple(datasets), Recipe.of(config, [dataset.hash for dataset in datasets]), ())
    order, samples = data.recipe.order(data.sizes, config.seed), config.samples_after(config.steps)
    read = epochs_read(data, samples)
    for number, source in enumerate(config.data.blend):
        if source.max_epochs is None or read[number] <= source.max_epochs:
            continue
        size = data.sizes[number]
        beyond = order.first_beyond(number, source.max_epochs * size, samples)
        assert beyond is not None
        step = step_of(config, beyond)
        what = (
            f"{source.dataset or ', '.join(source.sources)} is read {read[number]:.3g} times within {config.steps} steps; "
            f"{source.max_epochs:g} are done at step {step} (sample {beyond:,})"
        )
        least = f", or a weight of at most {source.weight * source.max_epochs / read[number]:.3g}"
        simple = source.weight > 0 and not config.data.stages
        remedy = f"allow {read[number]:.3g} or more, use at most {step - 1} steps{least if simple else ''}"
        yield Problem(f"data.blend[{number}].max_epochs", what, remedy)


def step_of(config: RunConfig, sample: int) -> int:
    """The step, from 1, that trains on the sample of an id."""
    low, high = 0, 1  # samples_after(low) <= sample < samples_after(high)
    while config.samples_after(high) <= sample:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if config.samples_after(middle) <= sample else (low, middle)
    return high
