"""Writes the tables of performance.md and NOTES.md from the result files, so that no figure is typed by hand.

Run it with `python -m benchmarks.render`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cells import BEST

from benchmarks import ablation, images, startup, time_to_loss, traps, tuning, versions

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
THREATS = Path(__file__).parent.parent / "docs" / "threat-model.md"
NOTES = Path(__file__).parent / "NOTES.md"


def main() -> None:
    """For each result file, replace the text between its marks (HTML comments) in the documents."""
    pages: tuple[tuple[str, Any], ...] = (
        ("tuning", tuning), ("time_to_loss", time_to_loss), ("ablation", ablation), ("startup", startup),
        ("images", images), ("versions", versions),
    )  # fmt: skip
    for name, module in pages:
        for file in (module.RESULT, *sorted(module.RESULT.parent.glob(f"{name}-*.json"))):  # and of other machines
            if file.exists():
                result = json.loads(file.read_text())
                _fill(DOCUMENT, file.stem, f"{_where(result['machine'])}.\n\n{module.table(result).strip()}")
    for file in sorted(tuning.RESULT.parent.glob("tuning*.json")):
        _fill(DOCUMENT, file.stem.replace("tuning", "speed"), headline(json.loads(file.read_text())["records"]))
    if traps.RESULT.exists():
        _fill(THREATS, "traps", traps.table(json.loads(traps.RESULT.read_text())))
    measured = json.loads(tuning.RESULT.read_text())["records"] if tuning.RESULT.exists() else []
    if tuning.PREDICTED.exists():
        _fill(NOTES, "predictions", predictions(json.loads(tuning.PREDICTED.read_text())["records"], measured))


def headline(measured: list[dict[str, Any]]) -> str:
    """A Markdown table that compares `offsite tune` with its peers: transformers' Trainer on the whole model.

    It has one row for each cell (model and data set) that has peers.

    Args:
        measured: the records of `benchmarks.tuning`.
    """
    lines = [
        "| model, data | speed, full / LoRA | as the paper's code runs them | memory below, full / LoRA |",
        "|---|---|---|---|",
    ]
    for record in measured:
        if record["contestant"] == "offsite lora" and f"speed_vs_{BEST[0]}" in record:
            speed, padded, memory = (
                " / ".join(str(record[name]) for peer in BEST if (name := f"{what}_vs_{peer}{how}") in record)
                or "not run"
                for what, how in (("speed", ""), ("speed", "_padded"), ("memory", ""))
            )
            lines.append(f"| {record['shape']}, {record['data']} | {speed} | {padded} | {memory} |")
    return "\n".join(lines)


def predictions(predicted: list[dict[str, Any]], measured: list[dict[str, Any]]) -> str:
    """A Markdown table of the ratios of speed that counted operations predict, next to the measured ones.

    Args:
        predicted: the records of `benchmarks.tuning --predict`.
        measured: the records of `benchmarks.tuning`.
    """
    found = {_key(record): record for record in measured}
    lines = ["| shape, data | contestant | against | counted before | measured |", "|---|---|---|---|---|"]
    for record in predicted:
        for rival in BEST:
            outcome = found.get(_key(record), {}).get(f"speed_vs_{rival}", "")
            bound = record.get(f"counted_bound_vs_{rival}")
            lines.append(
                f"| {record['shape']}, {record['data']} | {record['contestant']} | {rival} | {bound} | {outcome} |"
            )
    return "\n".join(lines)


def _key(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """The shape, data set and contestant of a record, which identify it."""
    return record["shape"], record["data"], record["contestant"]


def _where(machine: Mapping[str, Any]) -> str:
    """A description of the machine as text."""
    return (
        f"{machine['processor']} ({', '.join(machine['instructions'])}), "
        f"{machine['arithmetic'] + ', ' if 'arithmetic' in machine else ''}{machine['threads']} thread(s), "
        f"{machine['memory_gib']} GiB, Python {machine['python']}"
    )


def _fill(file: Path, name: str, content: str) -> None:
    """Replace the text of a file between the marks `<!-- name -->` and `<!-- end -->` by `content`."""
    text = file.read_text(encoding="utf-8")
    marks = re.compile(rf"<!-- {name} -->.*?<!-- end -->", flags=re.DOTALL)
    if not marks.search(text):
        raise SystemExit(f"{file} has no marks for {name}: <!-- {name} --> and <!-- end -->")
    file.write_text(marks.sub(lambda _: f"<!-- {name} -->\n\n{content}\n\n<!-- end -->", text), encoding="utf-8")


if __name__ == "__main__":
    main()
