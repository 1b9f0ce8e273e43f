"""Optional packages: import them where they are used, and say how to install the extra that brings one."""

import importlib
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from offsite.errors import UsageError

_DISTRIBUTION = "offsite-tuning"


def require(module: str, extra: str, purpose: str) -> Any:
    """Import a Python module that only an extra (an optional group of dependencies) of this package installs.

    Args:
        module: the module's name; always a constant in this code, never read from data.
        extra: the extra that installs the module.
        purpose: the feature that needs the module, as the start of the error's sentence.

    Raises:
        UsageError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs a package that is not installed",
            reasons=[str(error)],
            next_step=install_command(extra),
        ) from None


def install_command(extra: str) -> str:
    """The command that installs an extra of this package: from its checkout if it runs from one, else by its name."""
    root = _checkout()
    return f"pip install {shlex.quote(f'{_DISTRIBUTION}[{extra}]')}" if root is None else _editable(root, extra)


def declared_requirements() -> list[str]:
    """The requirements of this package as PEP 508 lines; those of an extra end in `; extra == "NAME"`."""
    root = _checkout()
    if root is None:
        import importlib.metadata

        return importlib.metadata.requires(_DISTRIBUTION) or []
    project = _project(root)
    lines = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        lines += [f'{requirement}; extra == "{extra}"' for requirement in requirements]
    return lines


def _editable(root: Path, extra: str) -> str:
    """The command that installs an extra from a checkout, and keeps the checkout's code in use."""
    return f"pip install -e {shlex.quote(f'{root}[{extra}]')}"


@cache
def _checkout() -> Path | None:
    """The root of the checkout that this package runs from; None if it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    try:
        return root if _project(root).get("name") == _DISTRIBUTION else None
    except (OSError, ValueError):
        return None


def _project(root: Path) -> dict[str, Any]:
    """The table [project] of the pyproject.toml in a folder; {} if it has none."""
    import tomllib  # not at the start, since few commands need it

    project: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    return project
