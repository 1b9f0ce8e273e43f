"""Every causal model type of the installed transformers: packed, tuned and plugged in, or refused with a reason.

What happened to each is in docs/results/model-types.json, and docs/models.md shows it; here it must happen again.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from doc_scripts import DOCS
from every_type import try_type
from offsite.config import Method
from offsite.models.families.transformers_types import causal_types

# Types that are unlike each other, which a default run tries; these of them are tuned and plugged in too.
UNLIKE = {
    "olmo2": "norms behind attention and MLP",
    "granite": "scaled residuals and logits",
    "starcoder2": "layer norms, biases, a plain MLP",
    "cohere": "attention and MLP side by side, scaled logits",
    "codegen": "queries, keys and values in one matrix, cut for several devices",
    "gpt_oss": "stacked experts with biases, sinks of attention",
    "deepseek_v3": "latent attention, dense blocks before blocks of experts",
    "llama4_text": "chunked attention, experts in every second block",
    "qwen3_next": "linear attention and full attention in turn",
    "jamba": "attention, state spaces and experts in turn",
    "mamba": "no attention",
    "cpmant": "refused: later tokens change the logits of earlier ones",
}
TUNED = ("granite", "gpt_oss", "mamba")
RESULTS: dict[str, dict[str, Any]] = json.loads((DOCS / "results" / "model-types.json").read_text(encoding="utf-8"))[
    "types"
]


@pytest.mark.filterwarnings("ignore")  # of so many libraries' classes
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(one, marks=() if one in UNLIKE else pytest.mark.every_form) for one in sorted(RESULTS)],
)
def test_a_type_fares_as_the_document_says(model_type: str, tmp_path: Path) -> None:
    if model_type not in causal_types():
        pytest.skip("the installed transformers has no such type")
    methods: tuple[Method, ...] = () if model_type in UNLIKE else ("lora", "full")
    outcome = try_type(model_type, tmp_path, ("lora",) if model_type in TUNED else methods).record()
    expected = RESULTS[model_type]
    for key in ("status", "methods", "lora", "kinds"):
        found = outcome.get(key)
        assert (list(found) if isinstance(found, tuple) else found) == expected.get(key), (key, outcome.get("why"))


def test_the_document_says_why_a_type_does_not_work() -> None:
    assert set(UNLIKE) <= set(RESULTS)
    assert {one["status"] for one in RESULTS.values()} <= {"row", "derived", "refused", "not made"}
    assert all(one.get("why") for one in RESULTS.values() if one["status"] in ("refused", "not made"))
    working = [one for one in RESULTS.values() if one["status"] in ("row", "derived")]
    assert all(one["methods"] and ("lora" in one["methods"]) <= ("lora" in one) for one in working)
    assert len(working) >= len(RESULTS) // 2
