"""`dae sample`: a model writes general rows, for teams that have none.

There are three modes:
    --prompts FILE      the model answers each prompt in turn, cycling
    a chat template     the model writes the user's turn, then its answer (as in Magpie, arXiv 2406.08464)
    neither             the model starts from its first token

A row is written only if it encodes, as in training, to the ids that the model read and wrote (written_rows.py). An
answer truncated by `max_new_tokens` is marked (`"finish_reason": "length"`) and has no end token.

Rows are collected in OUTPUT.partial: a line with the settings, then one line per batch. A batch depends on (seed, batch
number) alone, so a stop costs at most one batch and changes no row.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from dae.sampling.generation import Continuation, Writer, derived_seed, open_writer
from dae.sampling.prompts import instruction_of, read_prompts, user_opening
from dae.sampling.recipe import SampleRecipe
from dae.sampling.written_rows import Batch, Prompt, RowMaker, is_space
from kd.data.chat import ChatFormat, UnrenderableError, chat_format
from kd.data.examples import conversation_ids
from kd.data.tokenizer_audit import PROBES, audit
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint, checkpoint
from kd.models.tokenizer_files import tokenizer_sha256
from kd.runs.claimed_folder import held_below, refuse_file
from kd.runs.files import append_lines, cut_torn_line, file_sha256, fsync_path, json_text, read_json, write_text_durably
from kd.runs.settings import changed_settings, refuse_changes

logger = logging.getLogger("dae")

IDLE_BATCHES = 20  # successive batches without a row after which we give up
PROMISE = "promise of rows"
ROWS_AS = "their ids are those that were read and written"  # files with another promise are not mixed
_INSTRUCTION, _ANSWER = 0, 1


def sample(recipe: SampleRecipe) -> Path:
    """Write `recipe.rows` rows; their file. Resumes an unfinished file; leaves a finished one as it is.

    Rows are {"text"}, {"messages"} or {"prompt", "completion"}. OUTPUT.meta.json records the model, the settings, how
    many rows ended with an end token, and why others were dropped.

    Raises:
        UserError: model, prompts or output cannot be used; the output was started with different settings or is not
            ours; the model gives no rows.
        MachineError: the disk is full. Whole batches are kept.
    """
    prompts = None if recipe.prompts is None else read_prompts(recipe.prompts)
    model = checkpoint(recipe.model)
    file = SampleFile(Path(recipe.output), settings_of(recipe, model))
    with file.claimed() as batches:
        if batches is None:
            logger.info("%s: already complete; nothing to do", recipe.output)
            return file.path
        writer = open_writer(model, recipe.trust_remote_code)
        warn_of_lossy_tokenizer(model, writer, prompts)
        write_batch = batch_writer(recipe, writer, prompts)
        with progress("rows", recipe.rows) as advance:
            advance(sum(len(batch.rows) for batch in batches))
            while sum(len(batch.rows) for batch in batches) < recipe.rows:
                if reasons := idle_reasons(batches):
                    words = f"the last {IDLE_BATCHES} batches gave no row ({reasons}); add prompts with --prompts FILE"
                    raise UserError(f"{model}: {words}")
                batches.append(write_batch(len(batches)))
                file.append(batches[-1])
                advance(len(batches[-1].rows))
        file.finish(batches, recipe.rows)
    return file.path


def settings_of(recipe: SampleRecipe, model: Checkpoint) -> dict[str, Any]:
    """Everything that determines the rows: the recipe without its output, and fingerprints of model and prompts."""
    settings = recipe.model_dump(mode="json", exclude={"output"})
    settings["content of model"] = model.fingerprint
    if (base := model.base) is not None:
        settings["content of its base"] = base.fingerprint
    if recipe.prompts is not None:
        settings["content of prompts"] = file_sha256(recipe.prompts)
    settings["content of tokenizer and chat template"] = tokenizer_sha256(model.tokenizer_home.folder)
    settings[PROMISE] = ROWS_AS
    return settings


def warn_of_lossy_tokenizer(model: Checkpoint, writer: Writer, prompts: Sequence[Prompt] | None) -> None:
    """Warn if the tokenizer drops characters of the prompts, or, without prompts, of a few probes."""
    texts = [
        text
        for prompt in prompts or ()
        for text in ([prompt] if isinstance(prompt, str) else [message["content"] for message in prompt])
    ]
    loss = audit(writer.tokenizer, model.tokenizer_home.folder, texts or PROBES).loss(str(model))
    if loss is not None:
        logger.warning("%s", loss)


def idle_reasons(batches: Sequence[Batch]) -> str:
    """Why none of the last `IDLE_BATCHES` batches gave a row, counted; empty if one did."""
    last = batches[-IDLE_BATCHES:]
    if len(last) < IDLE_BATCHES or any(batch.rows for batch in last):
        return ""
    reasons = sum((batch.dropped for batch in last), Counter[str]())
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())


@contextmanager
def progress(what: str, rows: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; the function that advances it by a number of rows."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=rows)
        yield lambda done: bar.update(task, advance=done)


# -- the file ----------------------------------------------------------------------------------------------------------


class SampleFile:
    """The output: OUTPUT.partial while incomplete, OUTPUT and OUTPUT.meta.json when complete."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.meta = path.with_name(path.name + ".meta.json")
        self._lock = path.with_name(f".{path.name}.lock")
        self._settings = dict(settings)

    @contextmanager
    def claimed(self) -> Iterator[list[Batch] | None]:
        """Hold the file for this process; the batches written so far, or None where all rows are there.

        Raises:
            UserError: see `sample`.
        """
        refuse_file(self.path.parent)
        if self.path.exists() and not self.partial.exists() and not self.meta.exists():
            raise UserError(f"{self.path}: was not written by this command; choose another output")
        with held_below(self.path.parent, self._lock, str(self.path)):
            yield self._batches_so_far()

    def _batches_so_far(self) -> list[Batch] | None:
        if self.partial.exists():
            cut_torn_line(self.partial)
            lines = self.partial.read_text(encoding="utf-8").splitlines()
            before, batches = json.loads(lines[0]) if lines else {}, [_batch_from(line) for line in lines[1:]]
            if any(batch.rows for batch in batches):
                refuse_changes(self.path, self._changes(before))
            if batches and not self._changes(before):
                return batches
            self.partial.unlink()  # no row is lost
        elif self.meta.exists():
            written = read_json(self.meta)
            refuse_changes(self.path, self._changes(written["settings"]))
            if not self.path.exists() or file_sha256(self.path) != written["sha256"]:
                fate = "changed" if self.path.exists() else "deleted"
                raise UserError(f"{self.path}: {fate} since it was written; remove {self.meta} to write it again")
            return None
        return []

    def _changes(self, recorded: Mapping[str, Any]) -> list[str]:
        return changed_settings({PROMISE: None, **recorded}, self._settings, SampleRecipe)

    def append(self, batch: Batch) -> None:
        """Append one batch; the first one after the settings."""
        line = {"rows": batch.rows, "stops": batch.stops, "tokens": batch.tokens, "dropped": batch.dropped}
        is_first = not self.partial.exists()
        lines = [self._settings, line] if is_first else [line]
        append_lines(self.partial, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines))
        if is_first:
            fsync_path(self.path.parent)

    def finish(self, batches: Sequence[Batch], rows: int) -> None:
        """Write the first `rows` rows, then their facts."""
        written = [row for batch in batches for row in batch.rows][:rows]
        stops = Counter([stop for batch in batches for stop in batch.stops][:rows])
        tokens = sum([count for batch in batches for count in batch.tokens][:rows])
        dropped = sum((batch.dropped for batch in batches), Counter[str]())
        write_text_durably(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
        facts = {
            "rows": rows,
            "stopped by": dict(stops),
            "tokens": tokens,
            "gave no row": dict(dropped),
            "sha256": file_sha256(self.path),
            "settings": self._settings,
        }
        write_text_durably(self.meta, json_text(facts))
        self.partial.unlink()
        logger.info(
            "%s: %d rows, %.0f tokens on average, stopped by %s; %d dropped%s",
            self.path,
            rows,
            tokens / rows,
            " and ".join(f"{stop}: {count}" for stop, count in stops.most_common()),
            sum(dropped.values()),
            f" ({', '.join(f'{reason}: {count}' for reason, count in dropped.most_common())})" if dropped else "",
        )


def _batch_from(line: str) -> Batch:
    values = json.loads(line)
    return Batch(values["rows"], values["stops"], values["tokens"], Counter(values["dropped"]))


# -- the rows ----------------------------------------------------------------------------------------------------------


def batch_writer(recipe: SampleRecipe, writer: Writer, prompts: Sequence[Prompt] | None) -> Callable[[int], Batch]:
    """The function from a batch's number to the batch."""
    fmt, draw = writer_format(recipe, writer, prompts), Draw(recipe, writer)
    if prompts is not None:
        return lambda number: answer_in_turn(draw, fmt, prompts, number)
    if fmt is not None:
        opening = user_opening(fmt, recipe.model)
        return lambda number: converse(draw, fmt, opening, number)
    start = (
        writer.tokenizer.bos_token_id if writer.tokenizer.bos_token_id is not None else writer.tokenizer.eos_token_id
    )
    if start is None:
        raise UserError(f"{recipe.model}: its tokenizer has neither BOS nor EOS; add prompts with --prompts FILE")
    return lambda number: begin(draw, start, number)


def writer_format(recipe: SampleRecipe, writer: Writer, prompts: Sequence[Prompt] | None) -> ChatFormat | None:
    """The writer's chat format, if it has a template. Raises UserError if the prompts need one and it has none."""
    if writer.tokenizer.chat_template:
        return chat_format(writer.tokenizer, writer.tokenizer.get_chat_template())
    if not all(isinstance(prompt, str) for prompt in prompts or ()):
        raise UserError(f"{recipe.prompts}: has messages, but {recipe.model} has no chat template; use text prompts")
    return None


@dataclass(frozen=True)
class Draw:
    """Samples continuations with the recipe's settings; `phase` separates the draws of one batch."""

    recipe: SampleRecipe
    writer: Writer

    def __call__(self, prompts: Sequence[Sequence[int]], number: int, phase: int = _ANSWER) -> list[Continuation]:
        seed = derived_seed(self.recipe.seed, number, phase)
        return self.writer.continuations(prompts, self.recipe.max_new_tokens, self.recipe.temperature, seed)

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text, which has its special tokens already."""
        return list(self.writer.tokenizer(text, add_special_tokens=False).input_ids)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of plain text: with the tokenizer's BOS, without an end token."""
        ids = list(self.writer.tokenizer(text).input_ids)
        return ids[:-1] if len(ids) > 1 and ids[-1] in self.writer.end_ids else ids


def begin(draw: Draw, start: int, number: int) -> Batch:
    """Texts from the model's first token: rows {"text"}."""
    batch, maker = Batch(), RowMaker(draw.writer.tokenizer, None)
    for written in draw([[start]] * draw.recipe.batch_size, number):
        batch.add(written, maker.row(None, [start], written))
    return batch


def answer_in_turn(draw: Draw, fmt: ChatFormat | None, prompts: Sequence[Prompt], number: int) -> Batch:
    """Answers to the next prompts, cycling."""
    size = draw.recipe.batch_size
    return answer(draw, fmt, [prompts[(number * size + place) % len(prompts)] for place in range(size)], number)


def converse(draw: Draw, fmt: ChatFormat, opening: tuple[str, str], number: int) -> Batch:
    """Conversations of one turn, both sides sampled."""
    before, after = opening
    dropped: Counter[str] = Counter()
    questions: list[Prompt] = []
    for written in draw([draw.encode(before)] * draw.recipe.batch_size, number, _INSTRUCTION):
        instruction, fault = instruction_of(written, after)
        if instruction:
            questions.append([{"role": "user", "content": instruction}])
        else:
            dropped[f"instruction: {fault}"] += 1
    batch = answer(draw, fmt, questions, number)
    batch.dropped.update(dropped)
    return batch


def answer(draw: Draw, fmt: ChatFormat | None, prompts: Sequence[Prompt], number: int) -> Batch:
    """Answers to these prompts: rows {"prompt", "completion"} for text, {"messages"} for messages."""
    batch, maker = Batch(), RowMaker(draw.writer.tokenizer, fmt)
    encoded: list[list[int]] = []
    kept: list[Prompt] = []
    for prompt in prompts:
        try:
            encoded.append(_encode_prompt(draw, fmt, prompt))
            kept.append(prompt)
        except UnrenderableError:
            batch.dropped["refused by the chat template"] += 1
    for prompt, ids, written in zip(kept, encoded, draw(encoded, number), strict=True):
        batch.add(written, maker.row(prompt, ids, written))
    return batch


def _encode_prompt(draw: Draw, fmt: ChatFormat | None, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return draw.encode_plain(prompt)
    assert fmt is not None
    where = draw.recipe.prompts or draw.recipe.model
    shown = json.dumps(prompt, ensure_ascii=False)[:60]
    ids = conversation_ids(fmt, prompt, ask=True, location=f"{where}: prompt {shown}")
    # As in training, a space at the end belongs to the first word of the answer.
    while len(ids) > 1 and is_space(draw.writer.tokenizer, ids[-1]):
        ids.pop()
    return ids
