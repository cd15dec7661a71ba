"""Drift: how far a model has moved from its teachers, teacher-forced on held-out responses.

    loss = -1/N sum_n log p_model(token n)          KL(teacher || model) = 1/N sum_n sum_v q_nv (log q_nv - log p_nv)

over the N response tokens of a route, in nats: what a student forgets is KL(reference || student) on general rows, how
far it still is from what it was to learn is KL(expert || student) on domain rows. Both come from final hidden states
through the chunked functions of kd.losses.token_loss, so no tensor of rows x positions x vocabulary is made.

During training `DriftCallback` logs both at every evaluation: a forgetting curve. For finished checkpoints:

    held_out = read_held_out({"general": ["rows.jsonl"]}, load_tokenizer(base, settings), settings)
    losses = measure_held_out(student, held_out, {"reference": reference, "expert": expert})

Shape legend: B rows, T positions, N response tokens of a batch, D width, V vocabulary rows, K teachers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dae_eval.results import HeldOutLoss
from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.batches import Batch, model_inputs, predicting_positions
from kd.data.examples import load_rows
from kd.data.fingerprint import data_sha256
from kd.data.mixing import MixedRows, pad_rows
from kd.data.token_rows import TokenRows
from kd.errors import UserError
from kd.losses.token_loss import TokenLoss, token_loss_sums
from kd.models.forward import final_hidden_states, head_of, learned_positions
from kd.models.head import Head
from kd.models.roles import Role, activate, vocabulary_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL = "general"
REFERENCE = "reference"

# What a forgetting curve is drawn from, at most, per route (see DriftCallback).
CURVE_ROWS = 256
CURVE_TOKENS = 16_384


@dataclass(frozen=True)
class HeldOutRows:
    """Encoded held-out rows of one route. path: its files; sha256: of the file, or of the hashes of several files."""

    route: str
    rows: TokenRows
    path: str
    sha256: str


@dataclass(frozen=True)
class Said:
    """What a model makes of a batch: hidden_ND [N, D] at the positions that predict response tokens; its head."""

    hidden_ND: Tensor
    head: Head


@dataclass(frozen=True)
class Means:
    """Over `tokens` response tokens, in nats per token: the loss, and KL(teacher || model) by the teacher's name."""

    tokens: int
    loss: float
    kl: Mapping[str, float]


# -- finished checkpoints ----------------------------------------------------------------------------------------------


def read_held_out(
    sources: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, settings: DataRecipe
) -> tuple[HeldOutRows, ...]:
    """Read and encode the files of each route, as training would.

    Args:
        sources: route -> JSONL files (or folders of `datasets`).
        tokenizer: as `kd.data.chat.load_tokenizer` gives it.
        settings: `max_length`, `append_eos` and `chat_template` are used; those of the run make losses comparable to
            its own.

    Raises:
        UserError: a file cannot be read, a row is wrong, or no row of a file gives a response token.
    """
    held_out = []
    for route, paths in sources.items():
        rows, _ = load_rows([SourceRecipe(path=path) for path in paths], tokenizer, settings)
        held_out.append(HeldOutRows(route, TokenRows.concatenate(rows), ", ".join(paths), sha256_of(paths)))
    return tuple(held_out)


def sha256_of(paths: Sequence[str]) -> str:
    """Fingerprint of one file's rows; of several files: SHA-256 over theirs, in order, whatever they are called."""
    hashes = [data_sha256(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def measure_held_out(
    model: Role, held_out: Sequence[HeldOutRows], teachers: Mapping[str, Role], *, batch_size: int = 8
) -> tuple[HeldOutLoss, ...]:
    """Held-out loss of a model on every route, and KL(teacher || model) for the teachers at hand.

    Args:
        model: a role, such as an adapter on a shared backbone; a model by itself is `Role(name, model, None)`. Its
            modes, its adapters and the random state are afterwards what they were.
        held_out: from `read_held_out`; all rows are measured.
        teachers: by name. `reference` is asked on every route, the others (`expert`, ...) on all but `general`, where
            they are nobody's teacher.
        batch_size: rows of one forward pass.

    Raises:
        UserError: the rows hold tokens that a model does not have, or are longer than its learnt positions.
    """
    measured = []
    for held in held_out:
        asked = {name: role for name, role in teachers.items() if name == REFERENCE or held.route != GENERAL}
        refuse_unfit_rows(held, [model, *asked.values()])
        batches = batches_of(held.rows, range(len(held.rows)), batch_size)
        answers = ({name: say(role, batch) for name, role in asked.items()} for batch in batches)
        means = teacher_forced(model, zip(batches, answers, strict=True), list(asked))
        measured.append(HeldOutLoss(held.route, held.path, held.sha256, means.tokens, means.loss, means.kl))
    return tuple(measured)


def refuse_unfit_rows(held: HeldOutRows, roles: Sequence[Role]) -> None:
    """Raise UserError where one of the models cannot take these rows."""
    largest, longest = int(held.rows.input_ids.max()), int(held.rows.lengths.max())
    for role in roles:
        if largest >= vocabulary_rows([role]):
            raise UserError(
                f"{held.path}: holds token {largest}, but {role.name} has only {vocabulary_rows([role])} vocabulary "
                "rows; the tokenizer does not belong to this model."
            )
        positions = learned_positions(role.model)
        if positions is not None and longest > positions:
            raise UserError(
                f"{held.path}: the longest row has {longest} tokens, but {role.name} has only {positions} positions; "
                f"set max_length to {positions}."
            )


# -- one model, batch by batch -----------------------------------------------------------------------------------------


def batches_of(rows: TokenRows, chosen: Iterable[int], size: int) -> list[Batch]:
    """The chosen rows in padded batches of `size`, longest first (ties as they come)."""
    mixed = MixedRows([rows], [0])
    order = sorted(chosen, key=lambda row: -int(rows.lengths[row]))
    # Any id will do for padding: it is outside of both masks.
    return [
        pad_rows([mixed[(0, row)] for row in order[start : start + size]], pad_token_id=0)
        for start in range(0, len(order), size)
    ]


@torch.no_grad()
def say(role: Role, batch: Batch) -> Said:
    """One forward pass of a role, in eval mode; afterwards its model is as it was."""
    placed = {key: value.to(role.model.device) for key, value in batch.items()}
    with activate(role) as model:
        hidden_BTD = final_hidden_states(model, model_inputs(placed))[:, :-1]
        return Said(hidden_BTD[predicting_positions(placed)], head_of(model))


@torch.no_grad()
def teacher_forced(model: Role, batches: Iterable[tuple[Batch, Mapping[str, Said]]], teachers: Sequence[str]) -> Means:
    """Means over batches, each with what the teachers said of it. One forward pass of the model per batch."""
    tokens, totals = 0, torch.zeros(1 + len(teachers), dtype=torch.float64)
    for batch, answers in batches:
        labels_N = batch["input_ids"][:, 1:][predicting_positions(batch)]
        totals += loss_and_kl(say(model, batch), labels_N, [answers[name] for name in teachers]).cpu()
        tokens += len(labels_N)
    loss, *kl = (totals / tokens).tolist()
    return Means(tokens, loss, dict(zip(teachers, kl, strict=True)))


def loss_and_kl(model: Said, labels_N: Tensor, teachers: Sequence[Said]) -> Tensor:
    """[1 + K] float64 sums over response tokens: -log p_model(label), and KL(teacher || model) of each teacher.

    A KL is over the vocabulary rows that both heads have; the loss over all of the model's own, whoever is asked.
    """
    labels_N, next_token = labels_N.to(model.hidden_ND.device), TokenLoss(weight=0.0)
    sums = [
        token_loss_sums(model.hidden_ND, model.head, labels_N, next_token, teacher.hidden_ND, teacher.head)
        for teacher in teachers
    ]
    rows = model.head.weight_VD.shape[0]
    whole = (one for one, teacher in zip(sums, teachers, strict=True) if teacher.head.weight_VD.shape[0] >= rows)
    own = next(whole, None) or token_loss_sums(model.hidden_ND, model.head, labels_N, next_token)
    return torch.stack([own.ntp, *(one.kl for one in sums)]).double()


# -- during training ---------------------------------------------------------------------------------------------------


def spread_rows(rows: TokenRows, most_rows: int, most_tokens: int) -> list[int]:
    """Rows at even distances over the whole file (which may be sorted) with at most so many response tokens, or one."""
    count = min(len(rows), most_rows)
    while True:
        chosen = np.arange(count) * len(rows) // count
        tokens = int(rows.response_counts[chosen].sum())
        if tokens <= most_tokens or count == 1:
            return [int(row) for row in chosen]
        count = min(count - 1, max(1, count * most_tokens // tokens))


@dataclass(frozen=True)
class KeptRoute:
    """The rows of one route's curve. hidden: by teacher, its final hidden states [N, D] of every batch, on the host."""

    batches: tuple[Batch, ...]
    teachers: Mapping[str, Role]
    hidden: Mapping[str, tuple[Tensor, ...]]

    @classmethod
    def ask(cls, rows: TokenRows, teachers: Mapping[str, Role], batch_size: int) -> KeptRoute:
        """Let every teacher pass once over the rows of the curve."""
        batches = batches_of(rows, spread_rows(rows, CURVE_ROWS, CURVE_TOKENS), batch_size)
        hidden = {name: tuple(say(role, b).hidden_ND.cpu() for b in batches) for name, role in teachers.items()}
        return cls(tuple(batches), teachers, hidden)

    def measure(self, model: Role) -> Means:
        """The model against what the teachers said."""
        answers = (
            {name: self._again(name, index, role) for name, role in self.teachers.items()}
            for index in range(len(self.batches))
        )
        return teacher_forced(model, zip(self.batches, answers, strict=True), list(self.teachers))

    def _again(self, name: str, index: int, role: Role) -> Said:
        with activate(role) as model, torch.no_grad():
            return Said(self.hidden[name][index].to(role.model.device), head_of(model))


class DriftCallback(TrainerCallback):
    """A forgetting curve: KL(reference || student), KL(expert || student) and loss per route, at every evaluation.

    Logged as one line before the first step and one at each evaluation: `drift/ROUTE/loss`, `drift/ROUTE/kl_NAME` for
    each teacher NAME of the route. Training goes on exactly as without it.

    Of each route at most CURVE_ROWS rows and CURVE_TOKENS response tokens are used (one row if it alone has more),
    spread evenly over its file. The teachers are frozen, so they pass over these rows once, when first needed; after
    that an evaluation costs the student's forward pass and the heads. What is kept for it is the teachers' final hidden
    states, in host memory: response tokens x width x bytes of an element for each teacher of a route, at most 128 MiB
    at width 4,096 in bfloat16.
    """

    def __init__(
        self,
        student: Role,
        teachers: Mapping[str, Mapping[str, Role]],
        held_out: Mapping[str, TokenRows],
        batch_size: int,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        """teachers: route -> name -> frozen role. held_out: route -> rows. log: as `Trainer.log`; called by all ranks.

        All ranks measure the same rows.
        """
        self._student = student
        self._teachers = teachers
        self._held_out = held_out
        self._batch_size = batch_size
        self._log = log
        self._kept: dict[str, KeptRoute] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0 and not args.eval_on_start:  # else that evaluation measures it
            self._log(self.measure())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log(self.measure())

    def measure(self) -> dict[str, float]:
        """The student as it is now, under the keys of a metrics line."""
        if not self._kept:
            self._kept = {
                route: KeptRoute.ask(rows, self._teachers[route], self._batch_size)
                for route, rows in self._held_out.items()
            }
        line: dict[str, float] = {}
        for route, kept in self._kept.items():
            means = kept.measure(self._student)
            line |= {f"drift/{route}/kl_{name}": value for name, value in means.kl.items()}
            line[f"drift/{route}/loss"] = means.loss
        return line
