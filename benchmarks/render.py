"""Write the tables of performance.md and NOTES.md from the results, so that no figure is typed by hand.

python -m benchmarks.render
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cells import BEST

from benchmarks import ablation, images, startup, time_to_loss, tuning, versions

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
NOTES = Path(__file__).parent / "NOTES.md"


def main() -> None:
    """Replace what stands between the marks of each result that is there."""
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
    measured = json.loads(tuning.RESULT.read_text())["records"] if tuning.RESULT.exists() else []
    if tuning.PREDICTED.exists():
        _fill(NOTES, "predictions", predictions(json.loads(tuning.PREDICTED.read_text())["records"], measured))


def headline(measured: list[dict[str, Any]]) -> str:
    """LoRA under `offsite tune` against its peers, where there are any, as Markdown."""
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
    """What was counted before anything ran, and what was measured then, as Markdown."""
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
    return record["shape"], record["data"], record["contestant"]


def _where(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['processor']} ({', '.join(machine['instructions'])}), "
        f"{machine['arithmetic'] + ', ' if 'arithmetic' in machine else ''}{machine['threads']} thread(s), "
        f"{machine['memory_gib']} GiB, Python {machine['python']}"
    )


def _fill(file: Path, name: str, content: str) -> None:
    text = file.read_text(encoding="utf-8")
    marks = re.compile(rf"<!-- {name} -->.*?<!-- end -->", flags=re.DOTALL)
    if not marks.search(text):
        raise SystemExit(f"{file} has no marks for {name}: <!-- {name} --> and <!-- end -->")
    file.write_text(marks.sub(lambda _: f"<!-- {name} -->\n\n{content}\n\n<!-- end -->", text), encoding="utf-8")


if __name__ == "__main__":
    main()
