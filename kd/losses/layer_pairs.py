"""Which layer of the student is compared with which layer of its teacher."""

from __future__ import annotations

from typing import Literal

from kd.errors import UserError

LayerPairs = tuple[tuple[int, int], ...]
Layers = Literal["even"] | LayerPairs


def layer_pairs(chosen: Layers, student_layers: int, teacher_layers: int, key: str) -> LayerPairs:
    """(student's layer, teacher's layer) pairs, both counted from 0.

    `even`: every layer of the student, with the teacher's layers spread over them so that the last meets the last:
    the uniform mapping of TinyBERT (arXiv 1909.10351), for any two depths.
    key: the recipe's key, for messages. Raises UserError for a layer that a model does not have.
    """
    if chosen == "even":
        return tuple((layer, ((layer + 1) * teacher_layers - 1) // student_layers) for layer in range(student_layers))
    for pair in chosen:
        for whose, layer, layers in zip(("student", "teacher"), pair, (student_layers, teacher_layers), strict=True):
            if layer >= layers:
                raise UserError(
                    f"{key}: {list(pair)}: the {whose} has no layer {layer}; its layers are 0 to {layers - 1}"
                )
    return tuple((student, teacher) for student, teacher in chosen)
