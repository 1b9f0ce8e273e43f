"""Tiny bases, made once each; tests copy what they spoil."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import Parties, tiny_base, tiny_parties

MakeBase = Callable[..., Path]


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """`base_of(family, blocks, **settings)`: the folder of such a base, the same at every call."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", blocks: int = 5, **settings: Any) -> Path:
        key = repr((family, blocks, sorted(settings.items())))
        if key not in made:
            made[key] = tiny_base(tmp_path_factory.mktemp("base") / "base", family, blocks, **settings)  # type: ignore
        return made[key]

    return make


@pytest.fixture
def parties(tmp_path: Path) -> Parties:
    return tiny_parties(tmp_path)
