"""Writes the table in README.md from docs/results/table1/results.json, so that it cannot drift: `make docs`."""

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results" / "table1" / "results.json"

NAMES = {
    "gsm8k": "GSM8K",
    "sciq": "SciQ",
    "webquestions": "WebQuestions",
    "e2e_nlg": "E2E",
    "text2sql_geo": "text2sql",
    "openbookqa": "OpenBookQA",
    "arc_challenge": "ARC-Challenge",
}
MODELS = {
    "zero_shot": "zero-shot",
    "full": "full fine-tuning",
    "emulator": "emulator, tuned",
    "plug_in": "**plug-in**",
}


def table(results: dict[str, Any]) -> str:
    """Losses of each data set; gain recovered and the emulator's own gain are computed from them."""
    heads = ("data set", *MODELS.values(), "gain recovered", "emulator's own gain")
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for cell in results["cells"]:
        losses = {model: cell["scores"][model]["loss"]["value"] for model in MODELS}
        cells = [f"**{loss:.3f}**" if model == "plug_in" else f"{loss:.3f}" for model, loss in losses.items()]
        gains = [f"{gain(losses, model):.0%}".replace("%", " %") for model in ("plug_in", "emulator")]
        lines.append(f"| {' | '.join((NAMES[cell['dataset']], *cells, *gains))} |")
    return "\n".join(lines)


def gain(losses: dict[str, float], model: str) -> float:
    """The share of full fine-tuning's gain over zero-shot that a model has."""
    return (losses[model] - losses["zero_shot"]) / (losses["full"] - losses["zero_shot"])


def render() -> str:
    """The README with its table as the results have it."""
    marks = re.compile(r"<!-- results -->.*?<!-- end -->", flags=re.DOTALL)
    content = f"<!-- results -->\n\n{table(json.loads(RESULTS.read_text(encoding='utf-8')))}\n\n<!-- end -->"
    text, found = marks.subn(lambda _: content, README.read_text(encoding="utf-8"))
    assert found == 1, "README.md has one pair of marks: <!-- results --> and <!-- end -->"
    return text


if __name__ == "__main__":
    README.write_text(render(), encoding="utf-8")
