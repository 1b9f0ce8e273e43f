"""What is shipped: the metadata of the package, the container file and the workflow of a release name what is there."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return content


def test_a_release_has_licence_readme_and_types(project: dict[str, Any]) -> None:
    named = project["project"]
    assert named["license"] == "MIT"
    assert all((ROOT / file).is_file() for file in [*named["license-files"], named["readme"]])
    assert all(url.startswith("https://") for url in named["urls"].values())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["offsite"]
    assert (ROOT / "src" / "offsite" / "py.typed").is_file()


def test_the_container_is_made_of_what_is_there(project: dict[str, Any]) -> None:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    permitted = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"
    }
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    assert set(copied) == permitted
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", text)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    assert "\nUSER offsite\n" in text


def test_the_container_is_built_every_week() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "weekly.yml").read_text(encoding="utf-8"))
    commands = [step.get("run", "") for step in flow["jobs"]["container"]["steps"]]
    assert any("--file Containerfile" in command for command in commands)
    assert any(command.endswith("offsite doctor") for command in commands)


def test_the_install_page_has_every_extra(project: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    table = page.partition("## Extras")[2].partition("## ")[0]
    listed = set(re.findall(r"`([\w-]+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    assert listed == set(project["project"]["optional-dependencies"]) - {"dev"}


def test_only_the_upload_of_a_release_may_publish() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    assert flow["permissions"] == {"contents": "read"}
    may_publish = [name for name, job in flow["jobs"].items() if "id-token" in job.get("permissions", {})]
    assert may_publish == ["publish"]
    assert set(flow["jobs"]["publish"]["needs"]) == {"test", "source", "wheels"}
    assert "secrets." not in str(flow)
