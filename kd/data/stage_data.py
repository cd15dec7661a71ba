"""The rows of a stage: read, encoded, mixed by shares, and checked against the models that are to take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd.config.data_recipe import DataRecipe, default_shares
from kd.config.stage_recipe import StageRecipe
from kd.data.batches import Batch
from kd.data.chat import load_tokenizer
from kd.data.examples import SourceReport, load_rows
from kd.data.fingerprint import data_sha256
from kd.data.mixing import MixedRows, MixtureSource, Row
from kd.data.records import read_raw
from kd.data.token_rows import TokenRows
from kd.data.tokenizer_audit import audit, refuse_lossy
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.runs.provenance import HELD_OUT, DataInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StageData:
    """Encoded rows: training sources in the order of the routes, held-out rows per route, and what became of them.

    reports, inputs: of the sources of each route, held-out ones under `eval.NAME`; tokenizer_faults: what the tokenizer
    does to the rows' text, in words.
    """

    route_names: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    rows: tuple[TokenRows, ...]
    sources: tuple[MixtureSource, ...]
    reports: Mapping[str, Sequence[SourceReport]]
    held_out: Mapping[str, TokenRows]
    inputs: Mapping[str, Sequence[DataInput]]
    tokenizer_faults: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest row, held-out ones included."""
        return max(int(rows.lengths.max()) for rows in (*self.rows, *self.held_out.values()))

    @property
    def largest_id(self) -> int:
        return max(int(rows.input_ids.max()) for rows in (*self.rows, *self.held_out.values()))

    def counts(self, of_source: Callable[[SourceReport], int]) -> dict[str, int]:
        """A number of each source's report, summed over the sources of each name in `reports`."""
        return {name: sum(map(of_source, reports)) for name, reports in self.reports.items()}


# Of a source, for what is measured before the first step. Long rows: fewer of them, so that the first step comes soon.
SAMPLED_ROWS = 64
FEWEST_SAMPLED_ROWS = 8
SAMPLED_TOKENS = 4096


def sampled_rows(rows: TokenRows) -> range:
    """At most SAMPLED_ROWS rows, spread over the whole file, which may be sorted.

    Fewer where they have more than SAMPLED_TOKENS tokens, prompts included, but no fewer than FEWEST_SAMPLED_ROWS.
    """
    chosen = range(0, len(rows), -(-len(rows) // SAMPLED_ROWS))
    every = 1
    while len(chosen[:: every + 1]) >= FEWEST_SAMPLED_ROWS and tokens_of(rows, chosen[::every]) > SAMPLED_TOKENS:
        every += 1
    return chosen[::every]


def row_locations(recipe: DataRecipe, data: StageData, rows: Iterable[Row]) -> dict[Row, str]:
    """Where training rows lie, as errors of rows name them: `rows.jsonl:7`. Their sources are read again.

    None for rows of a source that has changed since. Raises UserError where one cannot be read.
    """
    sources = [source for name in data.route_names for source in recipe.routes[name]]
    reports = [report for name in data.route_names for report in data.reports[name]]
    inputs = [one for name in data.route_names for one in data.inputs[name]]
    wanted = set(rows)
    found: dict[Row, str] = {}
    for index in sorted({source for source, _ in wanted}):
        if data_sha256(sources[index].path) != inputs[index].sha256:
            continue
        dropped = frozenset(reports[index].dropped_at)
        raw = enumerate(read_raw(sources[index]))
        kept = (location for place, (location, _, _) in raw if place not in dropped)
        found |= {(index, row): location for row, location in enumerate(kept) if (index, row) in wanted}
    return found


def tokens_of(rows: TokenRows, chosen: range) -> int:
    return int(rows.lengths[list(chosen)].sum())


LoadRows = Callable[..., tuple[list[TokenRows], list[SourceReport]]]


def load_stage_data(
    recipe: StageRecipe,
    base: Checkpoint,
    route_names: Sequence[str],
    route_shares: Mapping[str, float] | None,
    load: LoadRows = load_rows,
    chat_template: Any = None,
) -> StageData:
    """Read and encode all rows.

    Args:
        recipe: of the stage.
        base: whose tokenizer encodes.
        route_names: the routes, in order.
        route_shares: each route's share where the recipe names none (None: by rows).
        load: what takes the place of kd.data.examples.load_rows.
        chat_template: takes the place of the tokenizer's own, where given.

    Raises:
        UserError: rows or tokenizer cannot be used, or the tokenizer loses text of many rows.
    """
    tokenizer = load_tokenizer(base, recipe.data, recipe.trust_remote_code, chat_template)
    encoded = {name: load(recipe.data.routes[name], tokenizer, recipe.data) for name in route_names}
    counts = {name: [len(rows) for rows in encoded[name][0]] for name in route_names}
    if recipe.data.has_shares:
        shares = {name: tuple(s.share or 0.0 for s in recipe.data.routes[name]) for name in route_names}
    else:
        shares = default_shares(counts, route_shares)
    sources = [
        MixtureSource(name, counts[name][i], shares[name][i], source.repeat, source.title)
        for name in route_names
        for i, source in enumerate(recipe.data.routes[name])
    ]
    inputs = {
        name: [
            DataInput(str(source.path), data_sha256(source.path), shares[name][i], encoded[name][0][i].sha256)
            for i, source in enumerate(recipe.data.routes[name])
        ]
        for name in route_names
    }
    reports = {name: encoded[name][1] for name in route_names}
    held_out = {}
    for name, eval_sources in recipe.data.eval.items():
        parts, reports[f"{HELD_OUT}{name}"] = load(eval_sources, tokenizer, recipe.data)
        held_out[name] = type(parts[0]).concatenate(parts)
        inputs[f"{HELD_OUT}{name}"] = [
            DataInput(str(source.path), data_sha256(source.path), encoded=part.sha256)
            for source, part in zip(eval_sources, parts, strict=True)
        ]
    return StageData(
        tuple(route_names),
        tokenizer,
        tuple(rows for name in route_names for rows in encoded[name][0]),
        tuple(sources),
        reports,
        held_out,
        inputs,
        tokenizer_faults(recipe, base, tokenizer, reports),
    )


def tokenizer_faults(
    recipe: StageRecipe,
    base: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    reports: Mapping[str, Sequence[SourceReport]],
) -> tuple[str, ...]:
    """What the tokenizer does to the rows' text, in words. Raises UserError where it loses text of many rows."""
    texts = [text for several in reports.values() for report in several for text in report.texts]
    found = audit(tokenizer, base.folder, texts)
    refuse_lossy(found, base.path, recipe.data.allow_lossy_tokenizer)
    return tuple(found.lines(base.path))


def lost_rows(report: SourceReport) -> str:
    """How many rows of a source were dropped or cut and why, in words; empty where none was."""
    reasons = "; ".join(f"{count} x {reason}" for reason, count in report.dropped.items())
    parts = [f"{sum(report.dropped.values())} dropped ({reasons})"] if reasons else []
    if report.truncated:
        parts.append(f"{report.truncated} cut to data.max_length")
    return f"of {report.records} rows, {' and '.join(parts)}" if parts else ""


def unread_keys(report: SourceReport) -> str:
    """The keys of a source's rows that nothing reads, in words; empty where there are none."""
    shown = sorted(report.unread.items(), key=lambda item: (-item[1], item[0]))
    return f"keys not read: {', '.join(f'{key} ({count:,})' for key, count in shown)}" if shown else ""


def remarks(report: SourceReport) -> list[str]:
    """All that a user should know of a source's rows, a line each."""
    return [line for line in (lost_rows(report), *report.notes, unread_keys(report)) if line]


def held_out_batches(data: StageData, collate_rows: Callable[[list[Any]], Batch], size: int) -> dict[str, list[Batch]]:
    """Held-out rows of each route in batches of `size`, longest first."""
    batches: dict[str, list[Batch]] = {}
    for name, rows in data.held_out.items():
        mixed = MixedRows([rows], [data.route_names.index(name)])
        order = sorted(range(len(rows)), key=lambda row: -int(rows.lengths[row]))
        batches[name] = [
            collate_rows([mixed[(0, row)] for row in order[start : start + size]])
            for start in range(0, len(order), size)
        ]
    return batches


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do: padding is outside attention and response masks."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)


def refuse_unfit_rows(recipe: StageRecipe, data: StageData, vocabulary_rows: int, positions: int | None) -> None:
    """Raise UserError where the models cannot take these rows.

    vocabulary_rows: rows that all heads share; positions: learnt positions of a model, None where they are computed.
    """
    if data.largest_id >= vocabulary_rows:
        raise UserError(
            f"{recipe.base}: its tokenizer gives token {data.largest_id}, but the models share only "
            f"{vocabulary_rows} vocabulary rows; the checkpoints do not belong together: pass those of one family."
        )
    if positions is not None and data.longest > positions:
        raise UserError(
            f"data.max_length: {recipe.data.max_length}: the longest row has {data.longest} tokens, but the model has "
            f"only {positions} positions; set data.max_length={positions}"
        )
