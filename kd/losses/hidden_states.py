"""Loss between hidden states of student and teacher: cosine distance or squared error, through a learnt projection.

The states are those that leave a layer (before the final norm), at the positions that predict a response token: sum
over these positions, mean over pairs of layers. Where the widths differ, each pair has a matrix of its own that takes
the student's states into the teacher's width, as in FitNets (arXiv 1412.6550) and TinyBERT (arXiv 1909.10351). It is
trained with the student and kept in checkpoints; the result does not hold it.

Shape legend: B rows, T positions, N response tokens, D and E widths of student and teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd.data.batches import Batch, predicting_positions
from kd.errors import UserError
from kd.losses.layer_pairs import LayerPairs
from kd.models.forward import decoder_of, unwrapped
from kd.models.head import Head, sum_dtype
from kd.models.roles import Role
from kd.models.sharding import gather

Distance = Literal["cosine", "mse"]


@dataclass(frozen=True)
class HiddenStateLoss:
    """The hidden states of chosen layers as a term of the objective (kd.losses.auxiliary.AuxiliaryLoss).

    pairs: decoder layers, (student's, teacher's); projections: one for each pair, or none where widths are equal.
    """

    weight: float
    distance: Distance
    pairs: tuple[tuple[nn.Module, nn.Module], ...]
    projections: nn.ModuleList | None = None
    name: str = "hidden"

    @contextlib.contextmanager
    def recording(self, batch: Batch) -> Iterator[Callable[[Tensor, Head], Tensor]]:
        """Both models run inside; afterwards the function gives the sum over the batch's response tokens."""
        predicting = predicting_positions(batch)
        recorded: dict[nn.Module, Tensor] = {}

        def note(layer: nn.Module, _arguments: Any, output: Any) -> None:
            hidden_BTD = output[0] if isinstance(output, tuple) else output
            recorded[layer] = hidden_BTD[:, :-1][predicting]

        def summed(_hidden_BTD: Tensor, _head: Head) -> Tensor:
            sums = []
            for place, (ours, theirs) in enumerate(self.pairs):
                projection = None if self.projections is None else self.projections[place]
                sums.append(distance_sum(recorded[ours], recorded[theirs], self.distance, projection))
            return torch.stack(sums).mean()

        with contextlib.ExitStack() as stack:
            for layer in {layer for pair in self.pairs for layer in pair}:
                stack.callback(layer.register_forward_hook(note).remove)
            yield summed


def hidden_state_loss(
    weight: float, distance: Distance, student: Role, teacher: Role, pairs: LayerPairs
) -> HiddenStateLoss:
    """The term over these pairs of layers. Where the widths differ, it makes projections, which are yet to be placed.

    A projection keeps angles as far as it can: its shorter side is orthonormal. Raises UserError for an architecture
    whose layers cannot be found.
    """
    ours, theirs = decoder_layers(student), decoder_layers(teacher)
    width, teacher_width = (int(unwrapped(r.model).config.get_text_config().hidden_size) for r in (student, teacher))
    projections = None
    if width != teacher_width:
        projections = nn.ModuleList(nn.Linear(width, teacher_width, bias=False) for _ in pairs)
        for weights in projections.parameters():
            nn.init.orthogonal_(weights)
    return HiddenStateLoss(weight, distance, tuple((ours[a], theirs[b]) for a, b in pairs), projections)


def decoder_layers(role: Role) -> nn.ModuleList:
    """The layers of a model, first to last. Raises UserError naming the architecture where they are not to be found."""
    count = unwrapped(role.model).config.get_text_config().num_hidden_layers
    for module in decoder_of(role.model).children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(
        f"hidden: role {role.name}: the layers of {type(unwrapped(role.model)).__name__} are unknown; remove `hidden`."
    )


def distance_sum(
    hidden_ND: Tensor, teacher_hidden_NE: Tensor, distance: Distance, projection: nn.Module | None = None
) -> Tensor:
    """Sum over N tokens of 1 - cosine, or of the mean over E of squared differences; in fp32 (fp64 for fp64).

    projection: takes [N, D] to [N, E]. N = 0 gives a zero that is still connected to the graph.
    """
    dtype = sum_dtype(hidden_ND.dtype)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        ours_NE, theirs_NE = hidden_ND.to(dtype), teacher_hidden_NE.detach().to(dtype)
        if projection is not None:
            # In float32 also where FSDP2's mixed precision has cast it.
            gather(projection)
            weight_ED: Any = projection.weight
            ours_NE = nn.functional.linear(ours_NE, weight_ED.to(dtype))
        if distance == "cosine":
            return (1.0 - nn.functional.cosine_similarity(ours_NE, theirs_NE, dim=-1)).sum()
        return (ours_NE - theirs_NE).square().mean(-1).sum()
