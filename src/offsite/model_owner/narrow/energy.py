"""Units with the least energy are removed: the mean square of what a unit adds to the hidden state.

This is the norm of a neuron's activation times the norm of its column, as in Wanda's structured forms (FLAP,
arXiv 2312.11983), and the same for the heads of a key-value head. What the others could make up for does not count.
"""

from offsite.model_owner.narrow.unit_rule_protocol import UnitProblem


def order_units(problem: UnitProblem, stay: int) -> list[int]:
    """The units that are removed, those with the least energy first, until `stay` units are left.

    The energy of unit u is the trace of W_u G_uu W_u^T, with W_u (H, size) its columns and G the Gram matrix.
    """
    units, size = problem.units, problem.size
    grams = problem.gram.reshape(units, size, units, size)  # (units, size, units, size)
    own = grams.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (units, size, size)
    columns = problem.weight.reshape(-1, units, size).permute(1, 0, 2)  # (units, H, size)
    energy = ((columns @ own) * columns).sum(dim=(1, 2))
    order: list[int] = energy.argsort(stable=True).tolist()
    return order[: units - stay]
