"""Counts the floating-point operations that tuning needs, from the shapes of a model; a multiply-add counts as two.

All counts are per token, without padding. A linear layer with P parameters needs 2 P operations in the forward pass,
2 P in the backward pass for the gradient of its input, and 2 P for the gradient of its weight, which frozen weights do
not have. Attention needs 4 T A operations per token and block in the forward pass (scores, and sums over T tokens;
A = heads * head size), and twice that in the backward pass. If rows differ in length, T is their mean weighted by
tokens. The backward pass ends at the lowest trained block; blocks below it only run forward. Norms, activations,
softmax and optimisers are left out: memory limits their speed, not their operations.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, of its bundle and of its rows that determine the number of operations."""

    blocks: int  # N of the base
    kept: int  # M of the bundle
    trained: int  # of these
    below: int  # of these, before the lowest that trains: through them no gradient goes
    block: int  # P_b: numbers in a block's linear maps
    pairs: int  # (inputs + outputs) of a block's linear maps, summed: what a LoRA rank multiplies
    attended: int  # A
    head: int  # V * H
    tokens: float  # mean tokens of a row
    context: float  # T: tokens that a token attends among, on average
    labelled: float  # share of tokens that carry a label


def peer(shape: Shape, method: str, rank: int, pad_to: int | None = None) -> float:
    """Operations per token to tune the whole base model, with its head on every token.

    Args:
        shape: the sizes of model and rows.
        method: "full" or "lora".
        rank: the rank of LoRA.
        pad_to: the width in tokens to which every row is padded; None: padding is not counted.
    """
    paid, length = (pad_to / shape.tokens, pad_to) if pad_to else (1.0, shape.context)
    passes = 6 if method == "full" else 4
    linear = passes * (shape.blocks * shape.block + shape.head)
    lora = 0 if method == "full" else 6 * rank * shape.pairs * shape.blocks
    attention = 3 * 4 * length * shape.attended * shape.blocks
    return (linear + lora + attention) * paid


def ours(shape: Shape, method: str, rank: int) -> float:
    """Operations per token to tune a bundle with `offsite tune`, with the head on labelled tokens only.

    Args:
        shape: the sizes of model, bundle and rows.
        method: "full" or "lora".
        rank: the rank of LoRA.
    """
    backwards = shape.kept - shape.below
    linear = 2 * (shape.kept + backwards) * shape.block + 4 * shape.head * shape.labelled
    trained = 2 * shape.block if method == "full" else 6 * rank * shape.pairs
    attention = 4 * shape.context * shape.attended * (shape.kept + 2 * backwards)
    return linear + trained * shape.trained + attention
