"""Formats the comparison of a base with its plug-in, as text or as values for JSON, and the warnings about it."""

import dataclasses
from typing import TYPE_CHECKING, Any

from offsite.cli.text_table import text_table

if TYPE_CHECKING:
    from offsite.model_owner.plugging_in.score_plug_in import Comparison, Transfer


def facts(transfer: "Transfer") -> dict[str, Any]:
    """The comparison as values that JSON can hold."""
    return dataclasses.asdict(transfer)


def lines(transfer: "Transfer") -> list[str]:
    """The comparison as lines of text: a table with a line for each metric."""
    head = ["", "base", "plug-in", "difference", "its 95 % interval"]
    rows = [
        [
            "loss, nats per token" if one.metric == "loss" else one.metric.replace("_", " "),
            f"{one.base:.4f}",
            f"{one.plug_in:.4f}",
            f"{one.difference:+.4f}",
            f"[{one.interval.low:+.4f}, {one.interval.high:+.4f}]" if one.interval else "",
        ]
        for one in transfer.comparisons
    ]
    return ["", *text_table(head, rows), f"on {transfer.rows:,} rows, {transfer.tokens:,} labelled tokens"]


def warnings(transfer: "Transfer") -> list[str]:
    """A sentence for each metric in which the plug-in is not better than the base, or not certainly."""
    return [sentence for one in transfer.comparisons if (sentence := _warning(one))]


def _warning(comparison: "Comparison") -> str | None:
    """What to warn of in one metric; None if the plug-in is certainly better."""
    name = comparison.metric.replace("_", " ")
    if comparison.verdict == "better":
        return None
    if not comparison.improves:
        return (
            f"warning: on these rows the plug-in is NOT better than the base by its {name}. If they are of the task, "
            "pack a bundle that is closer to the base, or plug in with --choose-on or a lower --strength"
        )
    return (
        f"warning: the rows do not show that the plug-in is better by its {name}: they are too few, or the interval of "
        "the difference includes 0. Score it on more rows"
    )
