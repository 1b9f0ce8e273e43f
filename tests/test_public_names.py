import ast
import subprocess
import sys
from pathlib import Path

import pytest

import offsite
from tiny import tiny_base, tiny_bundle, tiny_parties, tiny_rows


def test_all_names_are_there_and_resolve() -> None:
    for name in offsite.__all__:
        assert getattr(offsite, name) is not None
    assert set(offsite.__all__) <= set(dir(offsite))


def test_every_name_says_what_it_is() -> None:
    for name in set(offsite.__all__) - {"__version__"}:
        value = getattr(offsite, name)
        assert value.__doc__, name
        assert value.__module__.startswith("offsite."), name  # and not what some other library says of itself


def test_a_path_may_be_text(tmp_path: Path) -> None:
    parties = tiny_parties(tmp_path)
    bundle = tiny_bundle(tiny_base(tmp_path / "base"), tmp_path / "bundle", parties)
    assert offsite.verify_bundle(str(bundle.folder), parties.data_owner) == bundle  # type: ignore[arg-type]
    assert offsite.Base("base") == offsite.Base(Path("base"))  # type: ignore[arg-type]
    with pytest.raises(offsite.UsageError, match="not a checkpoint"):
        offsite.evaluate("a", str(tiny_rows(tmp_path / "rows.jsonl")), offsite.EvalSpec())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing"):
        offsite.verify_bundle(bundle.folder)  # type: ignore[call-arg]


def test_the_script_for_python_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parties, from a model folder to a score."""
    monkeypatch.chdir(tmp_path)
    tiny_base(Path("model"), blocks=6)
    for name in ("train", "test"):
        tiny_rows(Path(f"{name}.jsonl"), 8)
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    said: list[object] = []
    exec(code, {"print": lambda *words: said.extend(words)})
    assert said
    assert all(isinstance(figure, float) and figure > 0 for figure in said)


def test_the_three_lists_of_names_agree() -> None:
    """__all__, the table of modules, and the block that type checkers read."""
    tree = ast.parse(Path(offsite.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        (alias.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == set(offsite._MODULE_OF.items())
    assert set(offsite.__all__) == {name for name, _ in typed} | {"__version__"}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        offsite.nothing  # noqa: B018


def test_importing_offsite_imports_nothing_heavy() -> None:
    code = "import sys, offsite; offsite.OffsiteError; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "peft", "pydantic", "rich", "typer"} & set(loaded)
