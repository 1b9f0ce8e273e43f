import ast
import json
from collections import Counter
from pathlib import Path

import pytest

from offsite.errors import DataError
from offsite.study.demos.docstring_task import MARK, Task, make_task, standard_library, write_task


def function(name: str, docstring: str, body: str = "total = 0\n    for x in xs:\n        total += x") -> str:
    return f'def {name}(xs):\n    """{docstring}"""\n    {body}\n    return total\n\n'


def code_base(folder: Path, modules: int = 12, functions: int = 8) -> Path:
    """Small modules, each with functions of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for m in range(modules):
        source = "".join(function(f"sum_{m}_{f}", f"Sum up what list {m} holds, {f} times.") for f in range(functions))
        (folder / f"module_{m:02}.py").write_text(source)
    return folder


def modules_of(task: Task) -> tuple[set[str], set[str]]:
    return {f.module for f in task.train}, {f.module for f in task.test}


def test_nothing_leaks(tmp_path: Path) -> None:
    """No module, no code and no docstring of the test rows stands in the training rows."""
    source = code_base(tmp_path)
    common = function("copied", "Every module has a copy of this function.")
    answer = "The same words in every module, whatever the code."
    for m, file in enumerate(sorted(source.iterdir())):
        file.write_text(file.read_text() + common + function(f"other_{m}", answer.upper() if m % 2 else answer))
    task = make_task(source)
    train, test = modules_of(task)
    assert train
    assert test
    assert not train & test
    assert not {f.code for f in task.train} & {f.code for f in task.test}
    assert not {f.docstring.casefold() for f in task.train} & {f.docstring.casefold() for f in task.test}
    assert Counter(f.code for f in task.train).most_common(1)[0][1] == 1
    assert any("copied" in f.code for f in task.train)  # it is left out of the test only


def test_nothing_leaks_from_the_standard_library() -> None:
    task = make_task(standard_library(), 10**6, 10**6)
    train, test = modules_of(task)
    assert len(test) >= 10
    assert not train & test
    assert not {f.code for f in task.train} & {f.code for f in task.test}
    assert not {f.docstring.casefold() for f in task.train} & {f.docstring.casefold() for f in task.test}
    assert len(task.train) > 2000
    assert len(task.test) > 200
    assert not {"test", "idlelib", "site-packages", "lib2to3", "pydoc_data"} & (train | test)


def test_no_prompt_holds_a_docstring(tmp_path: Path) -> None:
    source = code_base(tmp_path)
    nested = """
class Box:
    '''A box that holds things.'''

    def outer(self, x):
        '''Give a function that adds x.'''
        def inner(y):
            '''Add x to whatever comes in.'''
            z = x + y
            return z
        return inner
"""
    for file in source.iterdir():
        file.write_text(file.read_text() + nested.replace("outer", f"outer_{file.stem}"))
    task = make_task(source)
    rows = (*task.train, *task.test)
    assert any("def inner" in row.code and "outer" in row.code for row in rows)
    for row in rows:
        tree = ast.parse(row.code)
        defined = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert all(ast.get_docstring(node) is None for node in defined)
        assert row.docstring not in row.code


def test_it_is_the_same_every_time(tmp_path: Path) -> None:
    source = code_base(tmp_path / "a")
    first = make_task(source)
    for file in sorted(source.iterdir(), reverse=True):  # another order in the folder, another place
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    assert make_task(tmp_path / "b") == first


def test_sizes_are_limited(tmp_path: Path) -> None:
    task = make_task(code_base(tmp_path), train_rows=40, test_rows=9)
    assert (len(task.train), len(task.test)) == (40, 9)


def test_what_is_no_function_with_a_docstring_is_left_out(tmp_path: Path) -> None:
    source = code_base(tmp_path)
    (source / "odd.py").write_text(
        "def bare(xs):\n    total = sum(xs)\n    return total\n\n"
        'def empty(xs):\n    """Only words, and nothing that they describe."""\n\n'
        + function("long_docstring", "word " * 200)
        + function("short_docstring", "Short.")
        + function("long_code", "A function with far too much code.", "total = 1\n    " + "total += xs[0]\n    " * 200)
        + function("paragraphs", "The first paragraph counts.\n\n    The second one does not.")
    )
    (source / "broken.py").write_text("def (:\n")
    (source / "binary.py").write_bytes(b"\x00\xff")
    (source / "escapes.py").write_text(function("escapes", "Holds an invalid escape \\d here."))
    (source / "tests").mkdir()
    (source / "tests" / "test_x.py").write_text(function("test_function", "A test, which is not the code base."))
    (source / ".hidden.py").write_text(function("hidden", "A hidden file, which is not the code base."))
    rows = [*make_task(source).train, *make_task(source).test]
    code = "\n".join(row.code for row in rows)
    for name in ("bare", "empty", "long_docstring", "short_docstring", "long_code", "test_function", "hidden"):
        assert f"def {name}(" not in code
    assert "The first paragraph counts." in {row.docstring for row in rows}
    assert "def escapes(" in code


def test_a_repository_with_one_package_is_split_by_what_is_in_the_package(tmp_path: Path) -> None:
    code_base(tmp_path / "src" / "package")
    (tmp_path / "README.md").write_text("not code")
    assert make_task(tmp_path) == make_task(tmp_path / "src" / "package")


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    source = code_base(tmp_path / "code")
    (source / "loop").symlink_to(source, target_is_directory=True)
    assert make_task(source) == make_task(code_base(tmp_path / "again"))


@pytest.mark.parametrize("modules", [0, 1, 3])
def test_too_few_functions(modules: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few documented functions") as caught:
        make_task(code_base(tmp_path, modules=modules))
    assert "expected at least 32 and 8" in caught.value.reasons[0]
    assert "--data" in (caught.value.next_step or "")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        make_task(tmp_path / "nothing")


def test_rows_as_jsonl(tmp_path: Path) -> None:
    task = make_task(code_base(tmp_path / "code"))
    train, test = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "test.jsonl"
    write_task(task, train, test)
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    assert [row["completion"] for row in rows] == [f.docstring for f in task.train]
    assert all(set(row) == {"prompt", "completion"} and row["prompt"].endswith(MARK) for row in rows)
    assert len(test.read_text().splitlines()) == len(task.test)
