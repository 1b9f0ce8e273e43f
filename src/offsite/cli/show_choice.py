"""Formats the choice of a plug-in: losses by checkpoint (rows) and strength (columns) as text, or values for JSON."""

import dataclasses
from typing import TYPE_CHECKING, Any

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
            candidate = losses[checkpoint, strength]
            row.append(f"{candidate.loss:.4f}{'*' if candidate == choice.best else ' '}")
        table.append(row)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    shown = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]
    best = f"checkpoint {choice.best.checkpoint} at strength {choice.best.strength:g}"
    return [*shown, f"* plugged in: {best}, by {choice.rows:,} rows, {choice.tokens:,} labelled tokens", ""]
