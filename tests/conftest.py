"""Before anything is imported: one thread for models this small, nobody asks the network, plain text 120 wide."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "120"
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # else help is coloured on GitHub's machines
for name in ("FORCE_COLOR", "PY_COLORS", "OFFSITE_HOME"):
    os.environ.pop(name, None)

import pytest  # noqa: E402

from offsite.model_owner.calibration import calibration_batches  # noqa: E402
from tiny import MakeBase, Parties, timm_imports, tiny_base, tiny_parties  # noqa: E402

CALIBRATION = 12_000  # characters


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-form",
        action="store_true",
        help="also tests marked every_form, each command of the demo as a process, and more examples of fuzzing",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.every_form:
        import hypothesis  # which takes its time

        hypothesis.settings.register_profile("long", max_examples=150)
        hypothesis.settings.load_profile("long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the further forms, unless they are asked for: by --every-form, by -m, or each by its own id."""
    if config.option.every_form or config.option.markexpr:
        return
    named = [argument for argument in config.args if "[" in argument]
    left_out = [
        item
        for item in items
        if item.get_closest_marker("every_form") and not any(asked.endswith(item.nodeid) for asked in named)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


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
    read = calibration_batches.read_calibration_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            calibration_batches,
            "read_calibration_text",
            lambda file, form=None: read(file, form) if file else read(None)[:CALIBRATION],
        )
        yield


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """`base_of(family, blocks, **settings)`: the folder of such a base, the same at every call; copy what you spoil."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", blocks: int = 5, **settings: Any) -> Path:
        key = repr((family, blocks, sorted(settings.items())))
        if key not in made:
            made[key] = tiny_base(tmp_path_factory.mktemp("base") / "base", family, blocks, **settings)  # type: ignore
        return made[key]

    return make


@pytest.fixture
def parties(tmp_path: Path) -> Parties:
    """Two homes that trust each other, for one test."""
    return tiny_parties(tmp_path)
