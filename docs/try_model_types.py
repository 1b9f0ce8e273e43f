"""Tries a tiny model of every causal model type of the installed transformers, and writes what happened.

`python docs/try_model_types.py` writes docs/results/model-types.json, from which docs/models.md is rendered
(`make docs`). With names of types, only these are tried again. It takes about half an hour on one core.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import transformers  # noqa: E402

from every_type import try_type  # noqa: E402
from offsite.models.families.transformers_types import causal_types  # noqa: E402

RESULTS = HERE / "results" / "model-types.json"


def try_types(names: list[str]) -> None:
    """Try each type and write its outcome at once."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"types": {}}
    known = {name: one for name, one in found["types"].items() if name in causal_types()}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="offsite-type-") as folder, contextlib.redirect_stderr(io.StringIO()):
            outcome = try_type(name, Path(folder), ()).record()
        print(outcome["status"], name, outcome.get("why", ""), flush=True)
        known[name] = {key: value for key, value in outcome.items() if key != "model_type"}
        content = {"transformers": transformers.__version__, "types": dict(sorted(known.items()))}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    try_types(sys.argv[1:] or list(causal_types()))
