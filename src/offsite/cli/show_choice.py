"""Formats the choice of a plug-in: losses by checkpoint (rows) and strength (columns) as text, or values for JSON."""

import dataclasses
from typing import TYPE_CHECKING, Any

from offsite.cli.text_table import text_table

if TYPE_CHECKING:
    from offsite.model_owner.plugging_in.choose_plug_in import Choice


def facts(choice: "Choice") -> dict[str, Any]:
    """The choice of a plug-in as values that JSON can hold."""
    return dataclasses.asdict(choice)


def lines(choice: "Choice") -> list[str]:
    """The choice of a plug-in as lines of text: a table of losses, in which the best candidate is marked."""
    strengths = sorted({candidate.strength for candidate in choice.candidates})
    losses = {(one.checkpoint, one.strength): one for one in choice.candidates}
    table = [["loss at strength", "0 (base)", *(f"{strength:g}" for strength in strengths)]]
    for checkpoint in sorted({candidate.checkpoint for candidate in choice.candidates}):
        row = [f"checkpoint {checkpoint}", f"{choice.base_loss:.4f}"]
        for strength in strengths:
            candidate = losses.get((checkpoint, strength))  # beyond the grid, only the best checkpoint is tried
            mark = "*" if candidate == choice.best else " "
            row.append(f"{candidate.loss:.4f}{mark}" if candidate else "")
        table.append(row)
    shown = text_table(table[0], table[1:])
    best = f"checkpoint {choice.best.checkpoint} at strength {choice.best.strength:g}"
    chosen = f"* plugged in: {best}, by {choice.rows:,} rows, {choice.tokens:,} labelled tokens"
    return [*shown, chosen, *([at_the_edge(choice)] if choice.edge else []), ""]


def at_the_edge(choice: "Choice") -> str:
    """The remark that the best strength is the smallest or the largest of those tried."""
    other = "smaller" if choice.edge == "smallest" else "larger"
    return (
        f"strength {choice.best.strength:g} is the {choice.edge} that was tried: a {other} one may be better "
        "(name further ones with --strengths)"
    )
