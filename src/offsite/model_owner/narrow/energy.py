"""Removal of units by energy: the units that add least to the hidden state, in mean square, are removed.

A neuron's energy is the squared norm of its activations times that of its column in the output projection, as in
structured forms of Wanda (FLAP, arXiv 2312.11983); the energy of heads is the same sum over their columns. Whether the
remaining units could compensate for the loss is not considered.
"""

from offsite.model_owner.narrow.unit_rule_protocol import UnitProblem


def order_units(problem: UnitProblem, stay: int) -> list[int]:
    """The indices of the units to remove, lowest energy first, so that `stay` units remain.

    The energy of unit u is the trace of W_u G_uu W_u^T: W_u (H, size) holds the unit's columns of the output
    projection, and G is the Gram matrix of the projection's inputs.
    """
    units, size = problem.units, problem.size
    grams = problem.gram.reshape(units, size, units, size)  # (units, size, units, size)
    own = grams.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (units, size, size)
    columns = problem.weight.reshape(-1, units, size).permute(1, 0, 2)  # (units, H, size)
    energy = ((columns @ own) * columns).sum(dim=(1, 2))
    order: list[int] = energy.argsort(stable=True).tolist()
    return order[: units - stay]
