"""Loss between the attention maps of student and teacher, from queries and keys, a few rows of a map at a time.

As in "A Teacher Is Worth A Million Instructions" (arXiv 2406.19112) the loss is KL(teacher's map || student's map). A
row of a map is what one position attends to; the rows taken are those of the positions that predict a response token,
so that this loss has the count of every other one: sum over rows, mean over heads and pairs of layers.

Models give their maps away only with eager attention, and all of them at once (field: 64 GiB for a 7B). Here every
model keeps the attention it was loaded with; on its way to it, queries and keys are noted after position embedding, and
a map's rows live for a moment only. Gradients with respect to queries and keys are written out, so equal maps have a
gradient of exactly zero.

Shape legend: B rows of a batch, T positions, H query heads, K key heads, C width of a head, n query positions and L key
positions of a chunk, G groups of heads that are compared.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from kd.data.batches import Batch, predicting_positions
from kd.errors import UserError
from kd.losses.chunked import ACCELERATOR_CHUNK_ELEMENTS, CPU_CHUNK_ELEMENTS
from kd.losses.hidden_states import decoder_layers
from kd.losses.layer_pairs import LayerPairs
from kd.models.forward import final_hidden_states, unwrapped
from kd.models.head import Head, sum_dtype
from kd.models.roles import Role, activate

logger = logging.getLogger("dae")

PROBE_TOKENS = 8
KNOWN_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class AttentionInputs:
    """What a layer makes its map of: softmax over the allowed keys of softcap * tanh(scaling * q k / softcap).

    query_BHTC and key_BKTC are those after position embedding; window: how many keys a position sees, itself included
    (None: all before it); softcap: Gemma-2's, None where there is none.
    """

    query_BHTC: Tensor
    key_BKTC: Tensor
    scaling: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class QueryRows:
    """The response rows of one training row: its place in the batch, its first position, and their positions."""

    row: int
    start: int
    positions_n: Tensor


@dataclass(frozen=True)
class AttentionLoss:
    """The attention maps of chosen layers as a term of the objective (kd.losses.auxiliary.AuxiliaryLoss).

    pairs: attention modules, (student's, teacher's).
    """

    weight: float
    models: tuple[nn.Module, ...]
    pairs: tuple[tuple[nn.Module, nn.Module], ...]
    name: str = "attention"

    @contextlib.contextmanager
    def recording(self, batch: Batch) -> Iterator[Callable[[Tensor, Head], Tensor]]:
        """Both models run inside; afterwards the function gives the sum over the batch's response tokens."""
        wanted = {module for pair in self.pairs for module in pair}
        recorded: dict[nn.Module, AttentionInputs] = {}

        def note(module: nn.Module, inputs: AttentionInputs, *_: Any) -> None:
            if module in wanted:
                recorded[module] = inputs

        def summed(_hidden_BTD: Tensor, _head: Head) -> Tensor:
            rows = response_rows(batch)
            sums = [map_kl_sum(recorded[student], recorded[teacher], rows) for student, teacher in self.pairs]
            return torch.stack(sums).mean()

        with observed_attention(self.models, note):
            yield summed


def attention_loss(weight: float, student: Role, teacher: Role, pairs: LayerPairs) -> AttentionLoss:
    """The term over these pairs of layers.

    Where two layers see unlike windows, their maps are compared over the keys that both see. Raises UserError for an
    architecture whose maps are not known here, and for heads that do not group.
    """
    if (
        student.model.device.type == "meta"
    ):  # nothing can be probed without weights; each layer stands for its attention
        layers, their_layers = decoder_layers(student), decoder_layers(teacher)
        return AttentionLoss(
            weight, (student.model, teacher.model), tuple((layers[a], their_layers[b]) for a, b in pairs)
        )
    ours, theirs = attention_layers(student), attention_layers(teacher)
    unlike = []
    for student_layer, teacher_layer in pairs:
        inputs, their_inputs = ours[student_layer][1], theirs[teacher_layer][1]
        head_groups(inputs.query_BHTC.shape[1], their_inputs.query_BHTC.shape[1])
        if inputs.window != their_inputs.window:
            unlike.append(f"{student_layer}-{teacher_layer}")
    if unlike:
        logger.warning(
            "attention: layers %s (student's-teacher's) have unlike sliding windows: their maps are compared over the "
            "keys that both see",
            ", ".join(unlike),
        )
    modules = tuple((ours[a][0], theirs[b][0]) for a, b in pairs)
    return AttentionLoss(weight, (student.model, teacher.model), modules)


def head_groups(student_heads: int, teacher_heads: int) -> int:
    """How many maps are compared: one per head of the model with fewer. Raises UserError where they do not group."""
    fewer, more = sorted((student_heads, teacher_heads))
    if more % fewer:
        raise UserError(
            f"attention: the student has {student_heads} attention heads and the teacher {teacher_heads}, and neither "
            "number divides the other, so their maps cannot be paired in groups; remove `attention`."
        )
    return fewer


@contextlib.contextmanager
def observed_attention(
    models: Sequence[nn.Module], note: Callable[[nn.Module, AttentionInputs, Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside, `note(module, inputs, value, output)` hears of every attention layer that runs.

    value [B, K, T, C] and output [B, T, H, C] are the layer's. The models keep their attention implementations (sdpa,
    flash, eager): these are only called through a function that notes. Raises UserError inside for what changes a map
    in a way that `AttentionInputs` does not hold.
    """
    names = {str(unwrapped(model).config.get_text_config()._attn_implementation) for model in models}
    configured = {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in names}

    def observing(name: str) -> Callable[..., Any]:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
        ) -> Any:
            function = configured[name] or eager_attention_of(module)
            result = function(module, query, key, value, attention_mask, **settings)
            for setting in ("s_aux", "position_bias"):  # attention sinks, and biases that are learnt
                if settings.get(setting) is not None:
                    raise UserError(
                        f"attention: {type(module).__name__} has attention sinks or biases ({setting}), which the "
                        "attention loss does not know; remove `attention`."
                    )
            scaling = settings.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            window, softcap = settings.get("sliding_window"), settings.get("softcap")
            note(module, AttentionInputs(query, key, scaling, window, softcap), value, result[0])
            return result

        return attend

    for name in names:
        ALL_ATTENTION_FUNCTIONS[name] = observing(name)
    try:
        yield
    finally:
        for name in names:
            del ALL_ATTENTION_FUNCTIONS[name]  # what was registered for all of transformers shows again


def eager_attention_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention that a model brings itself, in the file of its attention module."""
    function: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return function


def attention_layers(role: Role) -> dict[int, tuple[nn.Module, AttentionInputs]]:
    """Layer -> its attention module and what it makes its map of on a few tokens; every layer is checked.

    Raises UserError naming the architecture where a layer's output is not its map, as computed here, times its values.
    """
    base = unwrapped(role.model)
    config = base.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - set(KNOWN_LAYER_TYPES)
    layers: dict[int, tuple[nn.Module, AttentionInputs]] = {}
    errors: list[float] = []

    def note(module: nn.Module, inputs: AttentionInputs, value_BKTC: Tensor, output_BTHC: Tensor) -> None:
        layers[getattr(module, "layer_idx", -1)] = (module, inputs)
        expected_THC = output_BTHC[0].reshape(PROBE_TOKENS, inputs.query_BHTC.shape[1], -1).double()
        positions = torch.arange(PROBE_TOKENS)
        keys = slice(0, len(positions))
        scores_HTT = _scores(inputs, 0, positions, keys)
        map_HTT = _log_map(scores_HTT, _hidden_keys(positions, keys, inputs.window, scores_HTT.device)).exp()
        value_HTC = value_BKTC[0].repeat_interleave(map_HTT.shape[0] // value_BKTC.shape[1], dim=0)
        got_THC = (map_HTT.double() @ value_HTC.double()).transpose(0, 1)
        errors.append(float((got_THC - expected_THC).abs().max() / expected_THC.abs().max().clamp(min=1e-6)))

    ids = torch.arange(PROBE_TOKENS, device=role.model.device)[None]
    with activate(role) as model, torch.no_grad(), observed_attention([model], note):
        final_hidden_states(model, {"input_ids": ids})
    tolerance = 1e-4 if base.dtype in (torch.float32, torch.float64) else 3e-2
    if unknown or sorted(layers) != list(range(config.num_hidden_layers)) or not max(errors) < tolerance:
        raise UserError(
            f"attention: role {role.name}: {type(base).__name__} makes its attention maps in a way that is not known "
            f"here{''.join(f' ({name})' for name in sorted(unknown))}; remove `attention`."
        )
    for layer, (_, inputs) in sorted(layers.items()):
        refuse_hidden_window(role.name, base, layer, inputs.window)
    return layers


def refuse_hidden_window(role: str, model: PreTrainedModel, layer: int, passed: int | None) -> None:
    """Raise UserError if a layer's sliding window is only in its mask, where the few tokens of a probe do not reach it.

    passed: the window that the layer passes to its attention function. A window as long as the model's longest row
    masks nothing.
    """
    config = model.config.get_text_config()
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return
    if window >= (getattr(config, "max_position_embeddings", None) or math.inf):
        return
    if window != passed and (types is None or types[layer] == "sliding_attention"):
        raise UserError(
            f"attention: role {role}: {type(model).__name__} has a sliding window (sliding_window: {window}) in layer "
            f"{layer} without telling its attention function, so its attention maps are not known here; "
            "remove `attention`."
        )


def response_rows(batch: Batch) -> list[QueryRows]:
    """For every row of the batch, the positions that predict a response token; in a packed batch rows lie in a line."""
    predicting_BT = predicting_positions(batch).cpu()
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        spans = [(0, start, stop) for start, stop in itertools.pairwise([*starts, batch["input_ids"].shape[1]])]
    else:
        spans = [(row, 0, int(length)) for row, length in enumerate(batch["attention_mask"].sum(1).tolist())]
    return [
        QueryRows(row, start, start + predicting_BT[row, start:stop].nonzero().flatten()) for row, start, stop in spans
    ]


def map_kl_sum(
    student: AttentionInputs, teacher: AttentionInputs, rows: Sequence[QueryRows], *, chunk_elements: int | None = None
) -> Tensor:
    """KL(teacher's map || student's map) of one pair of layers: sum over `rows`, mean over heads, 0-dimensional.

    Where one model has more heads, the maps of consecutive heads are averaged until both have equally many.
    chunk_elements: how many entries of the maps exist at once. Gradients reach the student's queries and keys only;
    they are worked out in the forward pass. No rows give a zero that is still connected to the graph.
    """
    if chunk_elements is None:
        on_cpu = student.query_BHTC.device.type == "cpu"
        chunk_elements = CPU_CHUNK_ELEMENTS if on_cpu else ACCELERATOR_CHUNK_ELEMENTS
    total: Tensor = _ChunkedMapKL.apply(student.query_BHTC, student.key_BKTC, student, teacher, rows, chunk_elements)
    return total


class _ChunkedMapKL(torch.autograd.Function):
    """Forward over chunks of query rows with the gradients worked out on the way; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTC: Tensor,
        key_BKTC: Tensor,
        student: AttentionInputs,
        teacher: AttentionInputs,
        rows: Sequence[QueryRows],
        chunk_elements: int,
    ) -> Tensor:
        dtype = sum_dtype(query_BHTC.dtype)
        total = torch.zeros((), dtype=dtype, device=query_BHTC.device)
        grad_query_BHTC = grad_key_BKTC = None
        if any(ctx.needs_input_grad[:2]):
            grad_query_BHTC = torch.zeros_like(query_BHTC, dtype=dtype)
            grad_key_BKTC = torch.zeros_like(key_BKTC, dtype=dtype)
        window = _window(student, teacher)
        with torch.autocast(query_BHTC.device.type, enabled=False):
            for row, positions_n, keys in _chunks(student, teacher, rows, chunk_elements):
                scores_HnL = _scores(student, row, positions_n, keys)
                teacher_scores_HnL = _scores(teacher, row, positions_n, keys)
                hidden_nL = _hidden_keys(positions_n, keys, window, scores_HnL.device)
                kl, grad_HnL = _map_kl(scores_HnL, teacher_scores_HnL, hidden_nL, grad_query_BHTC is not None)
                total += kl
                if grad_HnL is None or grad_query_BHTC is None or grad_key_BKTC is None:
                    continue
                if student.softcap is not None:
                    grad_HnL.mul_(1.0 - (scores_HnL / student.softcap).square_())
                grad_HnL.mul_(student.scaling)
                key_KLC = key_BKTC[row, :, keys].to(dtype)
                grad_KgL = grad_HnL.reshape(len(key_KLC), -1, key_KLC.shape[1])
                query_HnC = query_BHTC[row][:, positions_n].to(dtype)
                grad_query_BHTC[row][:, positions_n] = (grad_KgL @ key_KLC).reshape(query_HnC.shape)
                query_KgC = query_HnC.reshape(len(key_KLC), -1, query_HnC.shape[-1])
                grad_key_BKTC[row, :, keys] += grad_KgL.transpose(1, 2) @ query_KgC
        ctx.save_for_backward(grad_query_BHTC, grad_key_BKTC)
        ctx.dtypes = (query_BHTC.dtype, key_BKTC.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [(grad * grad_total).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*gradients, None, None, None, None)


def _window(student: AttentionInputs, teacher: AttentionInputs) -> int | None:
    """Keys that a position sees in both models, itself included; None for all before it."""
    return min((inputs.window for inputs in (student, teacher) if inputs.window is not None), default=None)


def _chunks(
    student: AttentionInputs, teacher: AttentionInputs, rows: Sequence[QueryRows], elements: int
) -> Iterator[tuple[int, Tensor, slice]]:
    """(row of the batch, [n] query positions, the keys that any of them sees) with at most so many map entries."""
    heads, window = max(student.query_BHTC.shape[1], teacher.query_BHTC.shape[1]), _window(student, teacher)
    for queries in rows:
        if not len(queries.positions_n):
            continue
        keys = int(queries.positions_n[-1]) + 1 - queries.start
        for positions_n in queries.positions_n.split(max(1, elements // (heads * keys))):
            first = int(positions_n[0]) - window + 1 if window is not None else queries.start
            yield queries.row, positions_n, slice(max(first, queries.start), int(positions_n[-1]) + 1)


def _scores(inputs: AttentionInputs, row: int, positions_n: Tensor, keys: slice) -> Tensor:
    """[H, n, L] what is masked and put through softmax, in fp32 (fp64 for fp64)."""
    dtype = sum_dtype(inputs.query_BHTC.dtype)
    query_HnC, key_KLC = inputs.query_BHTC[row][:, positions_n].to(dtype), inputs.key_BKTC[row, :, keys].to(dtype)
    query_KgC = query_HnC.reshape(len(key_KLC), -1, query_HnC.shape[-1])  # heads of one key head lie side by side
    scores = (query_KgC @ key_KLC.transpose(1, 2)).reshape(*query_HnC.shape[:2], -1).mul_(inputs.scaling)
    return scores if inputs.softcap is None else scores.div_(inputs.softcap).tanh_().mul_(inputs.softcap)


def _hidden_keys(positions_n: Tensor, keys: slice, window: int | None, device: torch.device) -> Tensor:
    """[n, L] bool, on this device: which keys a position does not see."""
    distance_nL = positions_n.to(device)[:, None] - torch.arange(keys.start, keys.stop, device=device)
    return (distance_nL < 0) if window is None else (distance_nL < 0) | (distance_nL >= window)


def _log_map(scores_HnL: Tensor, hidden_nL: Tensor) -> Tensor:
    """[H, n, L] log of the map; -inf at hidden keys."""
    return scores_HnL.masked_fill(hidden_nL, -math.inf).log_softmax(-1)


def _map_kl(
    scores_HnL: Tensor, teacher_scores_HnL: Tensor, hidden_nL: Tensor, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(sum over rows and mean over heads of KL(t || m), its gradient with respect to the student's scores).

    m and t are means over the heads of a group. With p a head of the student and c heads in its group, the gradient is
    (p - t p/m - p sum(p - t p/m)) / c, which is exactly 0 where t = m = p.
    """
    log_p_HnL, log_q_HnL = _log_map(scores_HnL, hidden_nL), _log_map(teacher_scores_HnL, hidden_nL)
    groups = head_groups(len(log_p_HnL), len(log_q_HnL))
    log_m_GnL, log_t_GnL = _mean_of_groups(log_p_HnL, groups), _mean_of_groups(log_q_HnL, groups)
    t_GnL = log_t_GnL.exp()
    ratio_GnL = (log_t_GnL - log_m_GnL).masked_fill_(hidden_nL, 0.0)  # it was -inf - -inf
    kl = ratio_GnL.mul_(t_GnL).sum() / groups
    if not wants_grad:
        return kl, None
    size = len(log_p_HnL) // groups
    p_HnL = log_p_HnL.exp()
    pulled_HnL = t_GnL
    if size > 1:  # p/m is at most c, also where both are all but 0
        p_over_m_HnL = (log_p_HnL - log_m_GnL.repeat_interleave(size, dim=0)).exp_().masked_fill_(hidden_nL, 0.0)
        pulled_HnL = p_over_m_HnL.mul_(t_GnL.repeat_interleave(size, dim=0))
    grad_HnL = p_HnL - pulled_HnL
    grad_HnL.sub_(p_HnL.mul_(grad_HnL.sum(-1, keepdim=True)))
    return kl, grad_HnL.div_(size * groups)


def _mean_of_groups(log_HnL: Tensor, groups: int) -> Tensor:
    """[H, n, L] -> [G, n, L]: log of the mean of the maps of consecutive heads."""
    size = len(log_HnL) // groups
    if size == 1:
        return log_HnL
    return log_HnL.unflatten(0, (groups, size)).logsumexp(1).sub_(math.log(size))
