"""Before anything is imported: one thread for models this small, nobody asks the network, plain text 120 wide."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "120"
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # else help is coloured on GitHub's machines
for name in ("FORCE_COLOR", "PY_COLORS", "OFFSITE_HOME"):
    os.environ.pop(name, None)

import pytest  # noqa: E402

from offsite.model_owner import calibration  # noqa: E402
from tiny import timm_imports  # noqa: E402

CALIBRATION = 40_000  # characters


@pytest.fixture(autouse=True)
def _timm(request: pytest.FixtureRequest) -> None:
    """Models of timm are tested where it can be imported: beside the pinned torch for processors it cannot."""
    given = getattr(request.node, "callspec", None)
    named = [given.params.get(key) for key in ("kind", "architecture")] if given is not None else []
    if any(str(name).startswith("timm") for name in named) and not timm_imports():
        pytest.skip("timm cannot be imported here")


@pytest.fixture(autouse=True, scope="session")
def _short_calibration_text() -> Iterator[None]:
    """The start of the text that ships: tiny tokenizers take a third of a second for all of it, each time."""
    read = calibration.read_calibration_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            calibration, "read_calibration_text", lambda file: read(file) if file else read(None)[:CALIBRATION]
        )
        yield
