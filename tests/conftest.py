"""Before anything is imported: one thread for models this small, nobody asks the network, plain text 120 wide."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "120"
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # else help is coloured on GitHub's machines
for name in ("FORCE_COLOR", "PY_COLORS", "OFFSITE_HOME"):
    os.environ.pop(name, None)
