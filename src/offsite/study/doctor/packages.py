"""Compares the installed packages with those that this project needs, and lists which extras are installed."""

import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence

from packaging.requirements import Requirement

from offsite.extras import declared_requirements, install_command
from offsite.study.doctor.finding import Finding


def examine_packages() -> tuple[dict[str, str], dict[str, str], list[Finding]]:
    """Compare the installed packages with the declared requirements.

    Returns:
        The version of Python and of each needed package ("missing" if it is not installed); for each extra
        "installed" or what is missing; and a problem for each needed package that is missing or too old.
    """
    needed, by_extra = _sorted_requirements(declared_requirements())
    versions = {"python": platform.python_version()}
    findings = []
    for requirement in needed:
        found = _version(requirement.name)
        versions[requirement.name] = found or "missing"
        if not _fits(requirement, found):
            findings.append(
                Finding(
                    "problem",
                    f"{requirement.name} is {found or 'not installed'}, expected {requirement.specifier}",
                    f"pip install '{requirement.name}{requirement.specifier}'",
                )
            )
    extras = {}
    for extra, requirements in sorted(by_extra.items()):
        lacking = [str(one) for one in requirements if not _fits(one, _version(one.name))]
        extras[extra] = f"not installed: {install_command(extra)}" if lacking else "installed"
    return versions, extras, findings


def _sorted_requirements(lines: Sequence[str]) -> tuple[list[Requirement], Mapping[str, list[Requirement]]]:
    """Parse requirements; returns those that are always needed here, and those of each extra (without `dev`)."""
    needed: list[Requirement] = []
    by_extra: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        marker, requirement.marker = requirement.marker, None
        if marker is None or marker.evaluate({"extra": ""}):
            needed.append(requirement)
            continue
        for extra in re.findall(r'extra == "([\w-]+)"', str(marker)):
            if extra != "dev" and marker.evaluate({"extra": extra}):
                by_extra.setdefault(extra, []).append(requirement)
    return needed, by_extra


def _version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(requirement: Requirement, version: str | None) -> bool:
    """Whether a version is one that the requirement permits."""
    return version is not None and requirement.specifier.contains(version, prereleases=True)
