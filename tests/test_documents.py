"""Documents name files, headings and commands that exist, and quote the defaults that the specs have."""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from doc_scripts import load_script
from offsite.cli.setting_flags import flag_of, shown
from offsite.config import TABLES, PackSpec, Setting, TuneSpec
from offsite.model_owner.plugging_in.choose_plug_in import _LARGEST, _SMALLEST
from offsite.study.recipe import ROWS
from offsite.training.schedule import FEW_STEPS

ROOT = Path(__file__).parents[1]
FOREIGN = {
    "run_clm.py",
    "data.py",
    "RECIPE.toml",
    "offsite.toml",
}  # of the paper's code, any recipe, and what init writes
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SOURCE = re.compile(r"(?<![\w/.:-])((?:[\w.-]+/)*[\w-]+\.(?:py|c|toml))(?![\w/])")
MODULE = re.compile(r"python -m (benchmarks\.\w+)")
HISTORY = re.compile("decisions|results|reference|NOTES")  # what was so then, and what is generated
TARGET = re.compile(r"\bmake ((?:bench|demo|test|docs|install|format|clean)[\w-]*)")


@cache
def tracked() -> tuple[str, ...]:
    """Every file that git knows or would add, by its path from the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return tuple(name for name in listed if name and (ROOT / name).exists())


DOCUMENTS = [name for name in tracked() if name.endswith(".md")]


def prose(name: str) -> str:
    """A document without its fenced blocks and indented code, where nothing is a link."""
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    lost = []
    for link in LINK.findall(prose(name)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if "results/" not in name])
def test_every_source_file_that_is_named_is_there(name: str) -> None:
    """Paths are from the root, from the package, from the document's folder, or the end of exactly such a path."""
    text = (ROOT / name).read_text(encoding="utf-8")
    files = {f"/{file}" for file in tracked()}
    named = {path.removeprefix("../").removeprefix("../") for path in SOURCE.findall(LINK.sub("", text))} - FOREIGN
    assert [path for path in sorted(named) if not any(file.endswith(f"/{path}") for file in files)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_that_is_named_is_there(name: str) -> None:
    text, makefile = (ROOT / name).read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    for module in MODULE.findall(text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for target in TARGET.findall(text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in sorted(folder.glob("0*.md")) if f"({file.name})" not in index] == []


def test_every_document_is_within_reach_of_the_readme() -> None:
    seen, waiting = set(), ["README.md"]
    while waiting:
        name = waiting.pop()
        if name in seen or not name.endswith(".md"):
            continue
        seen.add(name)
        links = (link.partition("#")[0] for link in LINK.findall(prose(name)) if not link.startswith("http"))
        targets = ((ROOT / name).parent / link for link in links if link)
        waiting += [str(target.resolve().relative_to(ROOT)) for target in targets]
    pages = {name for name in DOCUMENTS if name.startswith(("docs/", "recipes/", "benchmarks/"))}
    assert pages - seen == set()


def quoted_defaults() -> Iterator[tuple[str, str, str]]:
    """(document, setting, default) of every row of the tables that have both columns."""
    for name in DOCUMENTS:
        columns: list[str] = []
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")] if line.startswith("|") else []
            if not cells:
                columns = []
            elif not columns:
                columns = cells
            elif {"setting", "default"} <= set(columns) and not cells[0].startswith("---"):
                row = dict(zip(columns, cells, strict=True))
                yield name, row["setting"], row["default"]


def is_default(setting: Setting, quoted: str) -> bool:
    """Whether a document quotes a default as it is.

    Of a setting that is left out, the quote has the figures that the help has, or where there are none its first word.
    """
    value = setting.field.default
    if value is not None:
        return quoted in (shown(value), str(value).lower(), f"{value:g}" if isinstance(value, float) else str(value))
    _, _, then = (setting.field.description or "").partition("left out: ")
    figures = [re.findall(r"\d[\d.e-]*", words) for words in (quoted, then.split("; ")[0])]
    alike = figures[0] == figures[1] if any(figures) else quoted.split()[:1] == then.split()[:1]
    return alike or quoted == "left out"


@pytest.mark.parametrize(("name", "setting", "default"), [*quoted_defaults()])
def test_every_quoted_default_is_the_one_in_force(name: str, setting: str, default: str) -> None:
    verb, key = setting.split(" ")
    by_flag = {flag_of(one): one for one in TABLES[verb].settings().values() if one.has_flag}
    found = by_flag.get(key) or TABLES[verb].settings()[key]
    assert is_default(found, default), name


def test_the_defaults_in_words_are_those_in_force() -> None:
    """What help and documents say of settings that are left out."""
    trained = PackSpec().verbatim(30)
    assert trained == {*range(4), *range(24, 30)}
    assert PackSpec().pruned == 0.5
    assert PackSpec(keep=8).pruned == 0
    assert [TuneSpec(method=method).peak_lr for method in ("full", "lora")] == [3e-4, 1e-3]
    assert "4 + 6 of 30 blocks" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "says", "in_force"),
    [
        ("docs/threat-model.md", "half of their weights", PackSpec().pruned == 0.5),
        ("docs/protocol.md", "| `sandwich` (default) |", PackSpec().placement == "sandwich"),
        ("docs/study.md", "# default: all six", len(ROWS) == 6),
        ("docs/data-owner.md", f"fewer than {FEW_STEPS} steps", True),
        ("docs/model-owner.md", f"down to {_SMALLEST:g} and up to {_LARGEST:g}", True),
        ("docs/model-owner.md", "4 of 13", PackSpec(select="influence").kept(range(13)) == 4),
    ],
)
def test_what_documents_say_in_words_is_in_force(name: str, says: str, in_force: bool) -> None:
    """Sentences about defaults and limits that are no rows of a table."""
    assert says in (ROOT / name).read_text(encoding="utf-8")
    assert in_force


def test_the_defaults_in_descriptions_are_those_in_force() -> None:
    described = {key: setting.field.description or "" for key, setting in TuneSpec.settings().items()}
    assert "left out: 0.1 for head_start = probe, else 10" in described["head_lr_factor"]
    assert [TuneSpec(head_start=start).head_factor for start in ("probe", "random")] == [0.1, 10]


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if not HISTORY.search(name)])
def test_defaults_are_quoted_in_tables_alone(name: str) -> None:
    """A default in a sentence would go unread by the test above."""
    assert re.findall(r"[Dd]efaults?(?: [a-z]+){0,3}[ :]+`?[\d.]+[^\n]*", prose(name)) == []


def test_the_readme_has_the_results_that_were_measured(renderer: ModuleType) -> None:
    assert renderer.README.read_text(encoding="utf-8") == renderer.render(), "run `make docs`"
    assert renderer.gain({"zero_shot": 4.0, "full": 2.0, "emulator": 3.0}, "emulator") == 0.5


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.fixture(scope="module")
def renderer() -> ModuleType:
    module: ModuleType = load_script("render_readme")
    return module
