"""Drift: how far a model has moved from its teachers, teacher-forced on the eval set.

    loss = -1/N sum_n log p_model(token n)          KL(teacher || model) = 1/N sum_n sum_v q_nv (log q_nv - log p_nv)

over the N response tokens of a route, in nats. KL(reference || student) on general rows is what a student forgets;
KL(expert || student) on domain rows is what it has not learned yet. Both are computed from final hidden states by the
chunked functions of kd.losses.token_loss, without a tensor of rows x positions x vocabulary.

During training `DriftCallback` logs both at every evaluation as a forgetting curve. For finished checkpoints:

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
from kd.models.teacher_logits import HiddenTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL = "general"
REFERENCE = "reference"

# Upper limits of the rows of a forgetting curve per route (see DriftCallback).
CURVE_ROWS = 256
CURVE_TOKENS = 16_384


@dataclass(frozen=True)
class HeldOutRows:
    """The encoded eval set of one route. path: its files; sha256: of the file, or of the hashes of several files."""

    route: str
    rows: TokenRows
    path: str
    sha256: str


@dataclass(frozen=True)
class ForwardPass:
    """A model on a batch: hidden_ND [N, D] at the positions that predict response tokens, and the head."""

    hidden_ND: Tensor
    head: Head


@dataclass(frozen=True)
class Means:
    """The loss and KL(teacher || model) by teacher over `tokens` response tokens, in nats per token."""

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
        settings: `max_length`, `append_eos` and `chat_template` are used; use those of a run to compare with it.

    Raises:
        UserError: a file cannot be read, a row is invalid, or no row of a file has a response token.
    """
    held_out = []
    for route, paths in sources.items():
        rows, _ = load_rows([SourceRecipe(path=path) for path in paths], tokenizer, settings)
        held_out.append(HeldOutRows(route, TokenRows.concatenate(rows), ", ".join(paths), sha256_of(paths)))
    return tuple(held_out)


def sha256_of(paths: Sequence[str]) -> str:
    """Fingerprint of one file's rows; for several files SHA-256 over theirs, in order and without their names."""
    hashes = [data_sha256(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def measure_held_out(
    model: Role, held_out: Sequence[HeldOutRows], teachers: Mapping[str, Role], *, batch_size: int = 8
) -> tuple[HeldOutLoss, ...]:
    """Held-out loss of a model on every route, and KL(teacher || model).

    Args:
        model: a role, such as an adapter on a shared backbone; `Role(name, model, None)` for a model by itself. Its
            modes, its adapters and the random state are restored.
        held_out: from `read_held_out`; all rows are measured.
        teachers: by name. `reference` is measured on every route, the others (`expert`, ...) on all except `general`.
        batch_size: rows of one forward pass.

    Raises:
        UserError: the rows have tokens that a model does not have, or are longer than its learned positions.
    """
    measured = []
    for held in held_out:
        asked = {name: role for name, role in teachers.items() if name == REFERENCE or held.route != GENERAL}
        refuse_unfit_rows(held, [model, *asked.values()])
        batches = batches_of(held.rows, range(len(held.rows)), batch_size)
        answers = ({name: forward(role, batch) for name, role in asked.items()} for batch in batches)
        means = teacher_forced(model, zip(batches, answers, strict=True), list(asked))
        measured.append(HeldOutLoss(held.route, held.path, held.sha256, means.tokens, means.loss, means.kl))
    return tuple(measured)


def refuse_unfit_rows(held: HeldOutRows, roles: Sequence[Role]) -> None:
    """Raise UserError if one of the models cannot read these rows."""
    largest, longest = int(held.rows.input_ids.max()), int(held.rows.lengths.max())
    for role in roles:
        if largest >= vocabulary_rows([role]):
            raise UserError(
                f"{held.path}: has token {largest}, but {role.name} has only {vocabulary_rows([role])} vocabulary "
                "rows; the tokenizer does not belong to this model"
            )
        positions = learned_positions(role.model)
        if positions is not None and longest > positions:
            raise UserError(
                f"{held.path}: the longest row has {longest} tokens, but {role.name} has only {positions} positions; "
                f"set max_length to {positions}"
            )


# -- one model, batch by batch -----------------------------------------------------------------------------------------


def batches_of(rows: TokenRows, chosen: Iterable[int], size: int) -> list[Batch]:
    """The chosen rows in padded batches of `size`, longest first (stable for equal lengths)."""
    mixed = MixedRows([rows], [0])
    order = sorted(chosen, key=lambda row: -int(rows.lengths[row]))
    # Any id can pad: it is outside of both masks.
    return [
        pad_rows([mixed[(0, row)] for row in order[start : start + size]], pad_token_id=0)
        for start in range(0, len(order), size)
    ]


@torch.no_grad()
def forward(role: Role, batch: Batch) -> ForwardPass:
    """One forward pass of a role in eval mode; its model is restored afterwards."""
    placed = {key: value.to(role.model.device) for key, value in batch.items()}
    with activate(role) as model:
        hidden_BTD = final_hidden_states(model, model_inputs(placed))[:, :-1]
        return ForwardPass(hidden_BTD[predicting_positions(placed)], head_of(model))


@torch.no_grad()
def teacher_forced(
    model: Role, batches: Iterable[tuple[Batch, Mapping[str, ForwardPass]]], teachers: Sequence[str]
) -> Means:
    """Means over batches, each with the forward passes of its teachers. The model passes once over each batch."""
    tokens, totals = 0, torch.zeros(1 + len(teachers), dtype=torch.float64)
    for batch, answers in batches:
        labels_N = batch["input_ids"][:, 1:][predicting_positions(batch)]
        totals += loss_and_kl(forward(model, batch), labels_N, [answers[name] for name in teachers]).cpu()
        tokens += len(labels_N)
    loss, *kl = (totals / tokens).tolist()
    return Means(tokens, loss, dict(zip(teachers, kl, strict=True)))


def loss_and_kl(model: ForwardPass, labels_N: Tensor, teachers: Sequence[ForwardPass]) -> Tensor:
    """[1 + K] float64 sums over response tokens: -log p_model(label), and KL(teacher || model) of each teacher.

    A KL is over the vocabulary rows that both heads have, the loss over all of the model's own.
    """
    labels_N, next_token = labels_N.to(model.hidden_ND.device), TokenLoss(weight=0.0)
    sums = [
        token_loss_sums(
            model.hidden_ND, model.head, labels_N, next_token, HiddenTeacher(teacher.hidden_ND, teacher.head)
        )
        for teacher in teachers
    ]
    rows = model.head.weight_VD.shape[0]
    whole = (one for one, teacher in zip(sums, teachers, strict=True) if teacher.head.weight_VD.shape[0] >= rows)
    own = next(whole, None) or token_loss_sums(model.hidden_ND, model.head, labels_N, next_token)
    return torch.stack([own.ntp, *(one.kl for one in sums)]).double()


# -- during training ---------------------------------------------------------------------------------------------------


def spread_rows(rows: TokenRows, most_rows: int, most_tokens: int) -> list[int]:
    """Rows at even distances over the file (which may be sorted), within both limits but at least one."""
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
        """Run every teacher once over the rows of the curve."""
        batches = batches_of(rows, spread_rows(rows, CURVE_ROWS, CURVE_TOKENS), batch_size)
        hidden = {name: tuple(forward(role, b).hidden_ND.cpu() for b in batches) for name, role in teachers.items()}
        return cls(tuple(batches), teachers, hidden)

    def measure(self, model: Role) -> Means:
        """The model against the kept hidden states of the teachers."""
        answers = (
            {name: self._kept(name, index, role) for name, role in self.teachers.items()}
            for index in range(len(self.batches))
        )
        return teacher_forced(model, zip(self.batches, answers, strict=True), list(self.teachers))

    def _kept(self, name: str, index: int, role: Role) -> ForwardPass:
        with activate(role) as model, torch.no_grad():
            return ForwardPass(self.hidden[name][index].to(role.model.device), head_of(model))


class DriftCallback(TrainerCallback):
    """A forgetting curve: KL(reference || student), KL(expert || student) and loss per route, at every evaluation.

    Logged as one line before the first step and one at each evaluation: `drift/ROUTE/loss`, `drift/ROUTE/kl_NAME` for
    each teacher NAME of the route. Training computes exactly the same as without it.

    At most CURVE_ROWS rows and CURVE_TOKENS response tokens of a route are used (one row if it alone has more), spread
    evenly over its file. The frozen teachers pass over these rows once; after that an evaluation costs the student's
    forward pass and the heads. The teachers' final hidden states are kept in host memory: response tokens x width x
    bytes of an element for each teacher of a route, at most 128 MiB at width 4,096 in bfloat16.
    """

    def __init__(
        self,
        student: Role,
        teachers: Mapping[str, Mapping[str, Role]],
        held_out: Mapping[str, TokenRows],
        batch_size: int,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        """teachers: route -> name -> frozen role. log: as `Trainer.log`. All ranks measure the same rows and log."""
        self._student = student
        self._teachers = teachers
        self._held_out = held_out
        self._batch_size = batch_size
        self._log = log
        self._kept: dict[str, KeptRoute] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0 and not args.eval_on_start:  # else that evaluation logs it
            self._log(self.measure())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log(self.measure())

    def measure(self) -> dict[str, float]:
        """The current student's loss and KL, under the keys of a metrics line."""
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
