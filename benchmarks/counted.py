"""What tuning costs by arithmetic alone: multiply-adds counted from shapes, two operations each.

Per real token. A linear map of P numbers costs 2 P forward, 2 P backward through its input, 2 P for its weight's
gradient; frozen weights have no gradient. Attention costs 4 T A a token and block forward (scores and sums over T
tokens, A = heads * head size), twice that backward; over rows of several lengths T is their mean weighted by tokens.
The backward pass goes down to the lowest trained block; what is kept below it runs forward alone. Norms, activations,
softmax and optimisers are left out: they are bound by memory, not by arithmetic.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model and its data, as far as arithmetic sees them."""

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
    """Operations a real token of tuning the whole base, head on every position, rows padded to `pad_to`."""
    paid, length = (pad_to / shape.tokens, pad_to) if pad_to else (1.0, shape.context)
    passes = 6 if method == "full" else 4
    linear = passes * (shape.blocks * shape.block + shape.head)
    lora = 0 if method == "full" else 6 * rank * shape.pairs * shape.blocks
    attention = 3 * 4 * length * shape.attended * shape.blocks
    return (linear + lora + attention) * paid


def ours(shape: Shape, method: str, rank: int) -> float:
    """Operations a real token of tuning the bundle, head on labelled positions alone."""
    backwards = shape.kept - shape.below
    linear = 2 * (shape.kept + backwards) * shape.block + 4 * shape.head * shape.labelled
    trained = 2 * shape.block if method == "full" else 6 * rank * shape.pairs
    attention = 4 * shape.context * shape.attended * (shape.kept + 2 * backwards)
    return linear + trained * shape.trained + attention
