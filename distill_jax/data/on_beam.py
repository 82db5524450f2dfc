"""Corpora in an Apache Beam pipeline, on one machine or many: exactly the rows of `build_corpus`.

Documents are laid end to end, so a row needs to know of those before it only how many tokens they
have. One pass finds the first of equal passages and counts tokens, stretch by stretch of the
sources; from the sums each stretch knows which rows it fills, and only rows that cross from one
stretch into the next are put together of pieces. Nothing depends on the runner or its workers.

Importing this module needs Apache Beam (`scripts/setup beam`).
"""

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions, TypeOptions
from apache_beam.runners.runner import create_runner
from etils import epath

from distill_jax import artifacts
from distill_jax.artifacts import InputError
from distill_jax.data import corpus, dataset, packing, texts
from distill_jax.data.corpus import CorpusConfig
from distill_jax.data.records import Span
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.data.tokenizer_files import load_tokenizer

Place = tuple[int, int, int]
"""Of a stretch: the number of the source, of the file in it, and where in the file it starts."""
_WORK = ".beam"
_SURVEY = "survey.json"
# Of one element on its way between workers, and of rows in one file of keys.
_TOKENS_AT_ONCE = 1 << 20
_KEYS_AT_ONCE = 1 << 16
_Name = tuple[str, Place, int]
_Chunk = tuple[_Name, np.ndarray, np.ndarray]
"""Documents that follow one another: (split, stretch, number in it), their lengths, their ids."""


def writer(runner: str, options: Sequence[str] = ()) -> corpus.Write:
    """A way to write a corpus, for `build_corpus`, whose directory all workers must reach.

    Args:
      runner: Beam's name of what runs pipelines: DirectRunner on this machine, DataflowRunner, ...
      options: Beam's pipeline options, "name=value", or "name" alone for a switch.

    Raises:
      InputError: there is no such runner or option.
    """
    beam_options = _parse(runner, options)

    def write(
        config: CorpusConfig, tokenizer: Tokenizer, place: epath.Path
    ) -> dict[str, dict[str, Any]]:
        for source in corpus.sources(config):
            texts.text_files(source)  # so that what is not there is told at once
        work = place / _WORK
        work.rmtree(missing_ok=True)
        work.mkdir(parents=True)
        try:
            counts = corpus.check_counts(config, _survey(config, work, runner, beam_options))
            tokenizer.save(work)
            rows = _Rows(config=config, work=work, splits=tuple(counts), pad_id=tokenizer.pad_id)
            dataset.write_dataset_on_beam(
                place,
                rows.add_to,
                sequence_length=config.sequence_length,
                runner=runner,
                options=beam_options,
            )
            return {split: _tally(work, split) for split in counts}
        finally:
            work.rmtree()

    return write


def _parse(runner: str, options: Sequence[str]) -> PipelineOptions:
    try:
        create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"runner: {' '.join(str(error).split())}") from error
    parsed = PipelineOptions([f"--{option}" for option in options])
    logger = logging.getLogger("apache_beam.options.pipeline_options")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns of what is refused here
    try:
        known = parsed.get_all_options().keys()
        unknown = parsed.get_all_options(retain_unknown_options=True).keys() - known
    finally:
        logger.setLevel(before)
    if unknown:
        raise InputError(f"runner options: Beam knows no {', '.join(sorted(unknown))}")
    parsed.view_as(TypeOptions).pipeline_type_check = False
    return parsed


def _survey(
    config: CorpusConfig, work: epath.Path, runner: str, options: PipelineOptions
) -> dict[str, int]:
    """Reads every text once: counts the distinct passages of each split.

    Raises:
      InputError: a text cannot be read; of several the first in the sources' order is told.
    """
    with beam.Pipeline(runner=runner, options=options) as pipeline:
        passages, errors = _passages(_stretches(pipeline, config), config)
        counted = (
            _first_of_equal(passages)
            | beam.MapTuple(lambda key, at: corpus.split_of(key, at[0][0], config))
            | beam.combiners.Count.PerElement()
            | beam.combiners.ToDict()
        )
        first_error = errors | beam.combiners.Top.Smallest(1)
        _ = counted | beam.Map(_write_survey, beam.pvalue.AsSingleton(first_error), work / _SURVEY)
    found = artifacts.read_object(work / _SURVEY)
    if found["errors"]:
        raise InputError(found["errors"][0])
    return found["passages"]


def _write_survey(counts: dict[str, int], errors: list[tuple[Place, str]], path: epath.Path):
    messages = [message for _, message in errors]
    artifacts.write_json(path, {"passages": counts, "errors": messages})


def _stretches(pipeline, config: CorpusConfig):
    """Every stretch of every source, as (place, (file, span))."""
    return (
        pipeline
        | "sources" >> beam.Create(list(enumerate(corpus.sources(config))))
        | "files" >> beam.FlatMapTuple(_files)
        | "spread files" >> beam.Reshuffle()
        | "stretches" >> beam.FlatMapTuple(_spans)
        | "spread stretches" >> beam.Reshuffle()
    )


def _files(number: int, source: str) -> Iterator[tuple[int, int, epath.Path]]:
    for file, path in enumerate(texts.text_files(source)):
        yield number, file, path


def _spans(
    number: int, file: int, path: epath.Path
) -> Iterator[tuple[Place, tuple[epath.Path, Span]]]:
    try:
        spans = texts.text_spans(path)
    except InputError:
        spans = [texts.WHOLE]  # whoever reads it will say what is wrong
    for span in spans:
        yield (number, file, span[0]), (path, span)


def _passages(stretches, config: CorpusConfig):
    """The digest of every passage with where it is, (place, number); and what cannot be read."""
    digests = functools.partial(_digests, field=config.field)
    read = stretches | "digest" >> beam.FlatMap(digests).with_outputs("errors", main="passages")
    return read.passages, read.errors


def _digests(stretch: tuple[Place, tuple[epath.Path, Span]], *, field: str) -> Iterator[Any]:
    place, (path, span) = stretch
    try:
        for number, text in enumerate(texts.read_text_span(path, span, field=field)):
            yield corpus.digest(text), (place, number)
    except InputError as error:
        yield beam.pvalue.TaggedOutput("errors", (place, str(error)))


def _first_of_equal(passages):
    """Of equal passages the first in the sources' order, whoever reads which when."""
    return passages | "first of equal" >> beam.CombinePerKey(min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """The pipeline from texts to rows.

    Attributes:
      config: of the corpus.
      work: a directory with the tokenizer, for what passes between driver and workers.
      splits: that get rows.
      pad_id: fills the last row.
    """

    config: CorpusConfig
    work: epath.Path
    splits: tuple[str, ...]
    pad_id: int

    def add_to(self, pipeline) -> dict[str, Any]:
        """(row_id, row) of each split, and beside them files of all rows' keys."""
        chunks = self._chunks(_stretches(pipeline, self.config))
        starts = (
            chunks
            | "tokens" >> beam.MapTuple(lambda name, lengths, ids: (name, len(ids)))
            | beam.combiners.ToList()
            | "starts" >> beam.Map(packing.starts)
        )
        cut = chunks | "cut" >> beam.FlatMap(
            self._cut, beam.pvalue.AsSingleton(starts)
        ).with_outputs("pieces", main="whole")
        joined = cut.pieces | beam.GroupByKey() | "join" >> beam.MapTuple(self._join)
        rows = (cut.whole, joined) | beam.Flatten()
        _ = (
            rows
            | "keys" >> beam.MapTuple(_key_of)
            | "keys together" >> beam.GroupByKey()
            | "write keys" >> beam.Map(functools.partial(_write_keys, work=self.work))
        )
        return {
            split: rows | f"{split} rows" >> beam.FlatMap(functools.partial(_of, split=split))
            for split in self.splits
        }

    def _chunks(self, stretches):
        passages, _ = _passages(stretches, self.config)
        kept = _first_of_equal(passages) | "kept" >> beam.MapTuple(self._keep)
        return (
            {"stretch": stretches, "kept": kept}
            | beam.CoGroupByKey()
            | "tokenize" >> beam.ParDo(_Tokenize(self.config, self.work))
        )

    def _keep(self, key: bytes, at: tuple[Place, int]) -> tuple[Place, tuple[int, str]]:
        place, number = at
        return place, (number, corpus.split_of(key, place[0], self.config))

    def _cut(self, chunk: _Chunk, starts: Mapping[_Name, int]) -> Iterator[Any]:
        """Whole rows, and the pieces of rows of which other chunks hold the rest."""
        name, lengths, ids = chunk
        split, length = name[0], self.config.sequence_length
        most = self.config.rows(split)
        documents = np.split(ids, np.cumsum(lengths)[:-1])
        for row, offset, pieces in packing.cut(documents, length, start=starts[name]):
            if most is not None and row >= most:
                return
            if sum(map(len, pieces)) == length:
                yield split, self._record(row, pieces)
            else:
                yield beam.pvalue.TaggedOutput("pieces", ((split, row), (offset, pieces)))

    def _join(
        self, name: tuple[str, int], parts: Iterable[packing.Part]
    ) -> tuple[str, dict[str, Any]]:
        split, row = name
        return split, self._record(row, packing.join(parts))

    def _record(self, row: int, pieces: Sequence[packing.Ids]) -> dict[str, Any]:
        laid = packing.lay(pieces, self.config.sequence_length, pad_id=self.pad_id)
        return corpus.record(row, *laid)


class _Tokenize(beam.DoFn):
    """Encodes what is kept of a stretch, in chunks that a worker can hold."""

    def __init__(self, config: CorpusConfig, tokenizer: epath.Path):
        self._config, self._place = config, tokenizer

    def setup(self):
        """Once a worker."""
        self._tokenizer = load_tokenizer(self._place)

    def process(self, element) -> Iterator[_Chunk]:
        """The chunks of each split, numbered in their order."""
        place, found = element
        (path, span), kept = found["stretch"][0], dict(found["kept"])
        for split in sorted(set(kept.values())):
            # Read once a split, so that no more than a chunk is held.
            read = enumerate(texts.read_text_span(path, span, field=self._config.field))
            passages = (text for number, text in read if kept.get(number) == split)
            documents = corpus.encode(passages, self._config, self._tokenizer)
            for number, (lengths, ids) in enumerate(_together(documents)):
                yield (split, place, number), lengths, ids


def _together(documents: Iterable[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents in groups of about as many tokens, each as lengths and ids."""
    waiting: list[np.ndarray] = []
    tokens = 0
    for document in documents:
        waiting.append(np.array(document, np.int32))
        tokens += len(document)
        if tokens >= _TOKENS_AT_ONCE:
            yield np.array([len(ids) for ids in waiting]), np.concatenate(waiting)
            waiting, tokens = [], 0
    if waiting:
        yield np.array([len(ids) for ids in waiting]), np.concatenate(waiting)


def _of(row: tuple[str, dict[str, Any]], *, split: str) -> Iterator[tuple[int, Any]]:
    if row[0] == split:
        yield row[1]["row_id"], row[1]


def _key_of(split: str, row: dict[str, Any]) -> tuple[tuple[str, int], tuple[int, str, int]]:
    tokens = int(np.count_nonzero(row["segment_ids"]))
    return (split, row["row_id"] // _KEYS_AT_ONCE), (row["row_id"], row["key"], tokens)


def _write_keys(
    of_file: tuple[tuple[str, int], Iterable[tuple[int, str, int]]], *, work: epath.Path
) -> None:
    (split, number), rows = of_file
    _, keys, tokens = zip(*sorted(rows))
    found = {"keys": "".join(keys), "rows": len(keys), "tokens": sum(tokens)}
    artifacts.write_json(work / f"{split}-{number}.json", found)


def _tally(work: epath.Path, split: str) -> dict[str, Any]:
    tally, number = corpus.Tally(split), 0
    while (path := work / f"{split}-{number}.json").exists():
        tally.add(**artifacts.read_object(path))
        number += 1
    return tally.figures()
