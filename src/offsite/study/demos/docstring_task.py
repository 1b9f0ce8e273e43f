"""Makes the task of the language demo from a folder of Python code: write the docstring for a function's code.

No test row may be known from training. So all functions of a top-level module (a package or a single file) are either
training rows or test rows, and a test row whose code or docstring is also in a training row is left out.
"""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from offsite.errors import DataError
from offsite.storage.files import replace_file

_Def = ast.FunctionDef | ast.AsyncFunctionDef
MARK = "\n\n# Docstring:\n"  # between the code and the answer
TRAIN_ROWS = 800
TEST_ROWS = 150
LEAST_TRAIN, LEAST_TEST = 32, 8
_TEST_SHARE = 1 / 8  # share of the functions that are test rows, approached by whole modules
_CODE = (40, 1000)  # least and most characters of a function's code; the most limits the row's tokens
_DOCSTRING = (10, 400)  # least and most characters of the answer
_SKIPPED = frozenset(
    {
        "__pycache__", "__phello__", "build", "dist", "dist-packages", "ensurepip", "idlelib", "lib2to3",
        "node_modules", "pydoc_data", "site-packages", "test", "tests", "turtledemo", "venv",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Function:
    """One function or method: its top-level module, its code without docstrings, and its docstring."""

    module: str
    code: str
    docstring: str

    @property
    def rank(self) -> str:
        """A hash, by which functions are sorted into a shuffled order that is the same on every machine."""
        return hashlib.sha256(f"{self.module}\n{self.code}\n{self.docstring}".encode()).hexdigest()


@dataclass(frozen=True)
class Task:
    """The functions to train on and the functions to test on; no module has functions in both."""

    train: tuple[Function, ...]
    test: tuple[Function, ...]

    def modules(self, side: tuple[Function, ...]) -> int:
        """The number of different top-level modules among the functions `side`, which are `train` or `test`."""
        return len({function.module for function in side})


def standard_library() -> Path:
    """The folder of the interpreter's own standard library."""
    return Path(sysconfig.get_path("stdlib"))


def make_task(source: Path, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS) -> Task:
    """Read the functions of a folder of Python code and split them by top-level module; deterministic.

    Args:
        source: a folder of Python files, read recursively; tests, hidden folders and environments are left out.
        train_rows: the largest number of training rows.
        test_rows: the largest number of test rows.

    Raises:
        DataError: the folder cannot be read or has too few documented functions for a split.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder", next_step="name a folder of Python code with --data")
    functions = sorted(set(_functions(source)), key=lambda function: function.rank)
    held_out = _test_modules(_unique(functions))
    train = _unique(function for function in functions if function.module not in held_out)
    codes = {function.code for function in train}
    answers = {function.docstring.casefold() for function in train}
    test = _unique(
        function
        for function in functions
        if function.module in held_out and function.code not in codes and function.docstring.casefold() not in answers
    )
    if len(train) < LEAST_TRAIN or len(test) < LEAST_TEST:
        found = f"found {len(train)} functions to train on and {len(test)} in other modules to test on"
        raise DataError(
            f"{source} has too few documented functions to split by module",
            reasons=[f"{found}, expected at least {LEAST_TRAIN} and {LEAST_TEST}"],
            next_step="name a larger folder of Python code with --data",
        )
    return Task(tuple(train[:train_rows]), tuple(test[:test_rows]))


def write_task(task: Task, train: Path, test: Path) -> None:
    """Write the training and the test rows as JSONL with {prompt, completion}.

    Raises:
        StorageError: a file cannot be written.
    """
    for path, side in ((train, task.train), (test, task.test)):
        lines = (json.dumps({"prompt": f.code + MARK, "completion": f.docstring}) + "\n" for f in side)
        replace_file(path, "".join(lines).encode())


def _unique(functions: Iterable[Function]) -> list[Function]:
    """Leave out repeated functions, so that each code occurs once."""
    return list({function.code: function for function in functions}.values())


def _test_modules(functions: Iterable[Function]) -> set[str]:
    """Choose the modules to test on, until they hold an eighth of the functions.

    Small modules are taken first, in the order of a hash of their names. Many small modules make a better test than one
    large module, which may also be missing on another machine.
    """
    sizes = Counter(function.module for function in functions)
    wanted = _TEST_SHARE * sizes.total()
    order = sorted(sizes, key=lambda name: (sizes[name] > wanted / 4, hashlib.sha256(name.encode()).hexdigest()))
    chosen: set[str] = set()
    held = 0
    for module in order:
        if held >= wanted:
            break
        if sizes[module] <= sizes.total() / 2:
            chosen.add(module)
            held += sizes[module]
    return chosen


def _functions(source: Path) -> Iterator[Function]:
    """Yield the documented functions in a folder of Python files, with their top-level modules."""
    files = sorted(_python_files(source))
    root = _common_folder(files, source)
    for file in files:
        module = file.relative_to(root).parts[0].removesuffix(".py")
        for docstring, code in _documented(_parse(file)):
            yield Function(module, code, docstring)


def _documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (docstring, code) for each function of a file whose docstring and code have a permitted length."""
    found: list[tuple[str, _Def]] = []
    for node in ast.walk(tree):
        if not isinstance(node, _Def | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        answer = docstring.strip().split("\n\n")[0].strip()
        if isinstance(node, _Def) and len(node.body) > 1 and _DOCSTRING[0] <= len(answer) <= _DOCSTRING[1]:
            found.append((answer, node))
        # The docstring is removed from the code, also if the function is nested in another one.
        node.body = node.body[1:] or [ast.Pass()]
    for answer, node in found:
        try:
            code = ast.unparse(ast.fix_missing_locations(node))  # printed from the syntax tree, so without comments
        except (ValueError, RecursionError):
            continue
        if _CODE[0] <= len(code) <= _CODE[1]:
            yield answer, code


def _python_files(folder: Path) -> Iterator[Path]:
    """Yield the Python files in a folder, without tests, environments, hidden folders and symbolic links."""
    for path in folder.iterdir():
        if path.is_symlink() or path.name.startswith((".", "config-")):
            continue
        if path.is_dir() and path.name not in _SKIPPED:
            yield from _python_files(path)
        elif path.suffix == ".py" and path.is_file():
            yield path


def _common_folder(files: list[Path], source: Path) -> Path:
    """The deepest folder that holds every file, so that a single package is split by the modules inside it."""
    root = source
    while len(names := {file.relative_to(root).parts[0] for file in files}) == 1 and (root / min(names)).is_dir():
        root /= names.pop()
    return root


def _parse(file: Path) -> ast.Module:
    """The syntax tree of a Python file; an empty one if the file cannot be read or is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in other people's code
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return ast.Module([], [])  # real code bases contain templates and broken examples
