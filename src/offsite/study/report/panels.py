"""Colours and panels of the plots of a report. Colours: Okabe and Ito's, for the colour-blind too."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "zero_shot": "#7f7f7f",
    "emulator_zero_shot": "#c8c8c8",
    "full": "#000000",
    "adapter_on_base": "#cc79a7",
    "emulator": "#e69f00",
    "plug_in": "#0072b2",
}


def panels(count: int, width: float, height: float, most: int = 3) -> "tuple[Figure, list[Axes]]":
    """Make a figure with panels.

    Args:
        count: the number of panels.
        width: the width of a panel in inches.
        height: the height of a panel in inches.
        most: the most panels in a line.
    """
    from matplotlib.figure import Figure

    columns = min(most, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = [figure.add_subplot(lines, columns, i + 1) for i in range(count)]
    return figure, axes
