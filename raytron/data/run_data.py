"""All data sets of a run, opened: one or a blend to train on, and those to validate on.

    data.dataset or sources ─► one source                 data.validation, or else the
    data.blend              ─► several, with weights      sources' own validation splits

A source is a tokenized data set, or text that is tokenized as it is read (`raytron.data.text_index`). Opening reads
manifests alone. The streams are made in the processes that read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from raytron.config import RunConfig
from raytron.data.batch import TokenStream
from raytron.data.manifest import Split
from raytron.data.order import FixedOrder
from raytron.data.reader import open_reader, shortage, size_of
from raytron.data.recipe import Recipe
from raytron.data.shards import Dataset, open_dataset
from raytron.data.stream import SampleStream, training_transform
from raytron.data.text_index import TextCorpus, open_text, text_folder
from raytron.errors import DataError


class Held(NamedTuple):
    """A validation set. share: of its loss in the main validation loss; all together 1."""

    name: str
    dataset: Dataset | TextCorpus
    split: Split
    share: float


class ValidationSet(NamedTuple):
    """What one validation set is read by."""

    name: str
    stream: TokenStream
    share: float  # of its loss in the main validation loss; all together 1


@dataclass(frozen=True)
class RunData:
    """The opened data sets of a run, in the order of `data.blend`, or the one that it reads."""

    config: RunConfig
    sources: tuple[Dataset | TextCorpus, ...]
    recipe: Recipe
    held: tuple[Held, ...]  # those that are long enough for a sample; none where the run does not evaluate

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each source. Raises DataError where one holds none. Makes pack plans that are needed and not there."""
        for dataset in self.sources:
            short = shortage(self.config, dataset, "train")
            if short is not None:
                raise DataError(short)
        known = (size_of(self.config, dataset, "train") for dataset in self.sources)
        return tuple(
            open_reader(self.config, dataset, "train").size if size is None else size
            for dataset, size in zip(self.sources, known, strict=True)
        )

    @property
    def tokens(self) -> int:
        """To train on, of all sources; of text about."""
        return sum(dataset.tokens("train") for dataset in self.sources)

    @property
    def unigram_entropy(self) -> float:
        """Nats per training token for a model that knows only how often each occurs; of a blend, the mean by the weights
        that it begins with."""
        shares = [weight / sum(self.recipe.stages[0].weights) for weight in self.recipe.stages[0].weights]
        return sum(share * each.unigram_entropy for share, each in zip(shares, self.sources, strict=True))

    @property
    def notices(self) -> list[str]:
        """What there is to say of each text that is tokenized as it is read."""
        return [each.notice for each in self.sources if isinstance(each, TextCorpus)]

    def train(self) -> TokenStream:
        """Raises DataError where a source is too short for one sample."""
        config = self.config
        readers = [open_reader(config, dataset, "train") for dataset in self.sources]
        order = self.recipe.order([reader.size for reader in readers], config.seed)
        transform = training_transform(config, self.sources[0])  # all have one tokenizer
        return SampleStream(order, readers, config.sequence_length, documents=config.data.apart, transform=transform)

    def validation(self) -> list[ValidationSet]:
        """Each set first to last, the same at every evaluation."""
        found = []
        for name, dataset, split, share in self.held:
            reader = open_reader(self.config, dataset, split)
            order, apart = FixedOrder(reader.size), self.config.data.apart
            stream = SampleStream(order, [reader], self.config.sequence_length, documents=apart)
            found.append(ValidationSet(name, stream, share))
        return found

    def make_plans(self) -> None:
        """Makes the pack plans of everything that will be read, where they are needed and not there, and verifies those that
        are: once, before many workers would. Raises DataError as `raytron.data.reader.open_reader`."""
        for dataset in self.sources if self.config.data.packing != "chop" else ():
            open_reader(self.config, dataset, "train", verify=True)
        for _, dataset, split, _ in self.held if self.config.data.packing != "chop" else ():
            open_reader(self.config, dataset, split, verify=True)


def open_run_data(config: RunConfig, folder: Path | str) -> RunData:
    """Opens what a run reads. folder: of its data set, or of the index of its text; a blend names its own. Raises
    DataError."""
    sources: tuple[Dataset | TextCorpus, ...]
    if config.data.blend:
        sources = tuple(open_entry(config, number) for number in range(len(config.data.blend)))
    else:
        sources = (open_text(folder) if config.data.source == "text" else open_dataset(folder),)
    recipe = Recipe.of(config, [dataset.hash for dataset in sources])
    held = tuple(_held(config, sources)) if config.evaluate.batches else ()
    return RunData(config, sources, recipe, held)


def open_entry(config: RunConfig, number: int) -> Dataset | TextCorpus:
    """What an entry of `data.blend` names. Raises DataError."""
    entry = config.data.blend[number]
    return open_text(text_folder(config, number)) if entry.sources else open_dataset(entry.dataset)


def source_names(config: RunConfig) -> list[str]:
    """A name for each entry of `data.blend`: that of its folder, or of the first of its files, with its number where two
    are alike."""
    places = [
        re.sub(r"[*?\[\]]", "", source.sources[0]) if source.sources else source.dataset for source in config.data.blend
    ]
    names = [Path(place).name or str(number) for number, place in enumerate(places)]
    return [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names)]


def _held(config: RunConfig, sources: tuple[Dataset | TextCorpus, ...]) -> Iterator[Held]:
    """The validation sets; those without a whole sample are left out."""
    if config.data.validation:
        for number, each in enumerate(config.data.validation):
            yield Held(each.name, open_dataset(each.dataset), each.split, float(number == 0))
        return
    shares = [source.weight for source in config.data.blend] or [1.0]
    names = source_names(config) or ["validation"]
    found = [
        Held(name, dataset, "validation", share)
        for name, dataset, share in zip(names, sources, shares, strict=True)
        if shortage(config, dataset, "validation") is None
    ]
    total = sum(each.share for each in found)
    yield from (each._replace(share=each.share / total if total else 1 / len(found)) for each in found)
