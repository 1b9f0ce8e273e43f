"""Every place in the package that makes an error for the user, with the text of its next step, read from the source."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import offsite

ROOT = Path(offsite.__file__).parent
ERRORS = {
    *("OffsiteError", "UsageError", "DataError", "VerificationError", "IncompatibleError", "PolicyError"),
    "StorageError",
}
GAP = "\N{HORIZONTAL ELLIPSIS}"  # a part of a text that is known only when the error is made


@dataclass(frozen=True)
class Site:
    """One error in the source."""

    file: str  # path in the package
    function: str
    line: int
    kind: str
    whats: tuple[str, ...]  # every text that the first sentence may have
    steps: tuple[str, ...]  # every text that the next step may have; empty: it has none

    @property
    def what(self) -> str:
        """The first sentence, in one of its forms."""
        return self.whats[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.function}: {self.what[:70]}"


@cache
def sites() -> tuple[Site, ...]:
    """All of them, in the order of the files."""
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found += list(_in_node(tree, "", file.relative_to(ROOT).as_posix(), _assigned(tree.body)))
    return tuple(found)


def _assigned(body: Iterable[ast.AST]) -> dict[str, ast.expr]:
    """What names are set to in some statements; a name that is set several times may have each of the values."""
    values: dict[str, list[ast.expr]] = {}
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for name, value in _pairs(target, node.value):
                    values.setdefault(name, []).append(value)
    return {name: ast.BoolOp(ast.Or(), found) if len(found) > 1 else found[0] for name, found in values.items()}


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, its in zip(target.elts, value.elts, strict=True):
            yield from _pairs(one, its)


def _in_node(node: ast.AST, function: str, file: str, constants: dict[str, ast.expr]) -> Iterator[Site]:
    for child in ast.iter_child_nodes(node):
        inner, outer = function, constants
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inner = f"{function}.{child.name}".lstrip(".")
            own = _assigned(ast.walk(child)) if isinstance(child, ast.FunctionDef) else {}
            constants = {**outer, **own}
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in ERRORS and child.args:
            step = next((word.value for word in child.keywords if word.arg == "next_step"), None)
            what = tuple(texts(child.args[0], constants))
            steps = tuple(texts(step, constants)) if step is not None else ()
            yield Site(file, function, child.lineno, child.func.id, what, steps)
        yield from _in_node(child, inner, file, constants)
        constants = outer


def texts(node: ast.expr, constants: dict[str, ast.expr]) -> list[str]:
    """Every text that an expression may give, with GAP for what is not in the source."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else [GAP]
    if isinstance(node, ast.JoinedStr):
        whole = [""]
        for part in node.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            options = texts(inner, constants)
            whole = [before + option for before in whole for option in options]
        return whole
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in texts(node.left, constants) for b in texts(node.right, constants)]
    if isinstance(node, ast.IfExp):
        return [*texts(node.body, constants), *texts(node.orelse, constants)]
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in texts(value, constants)]
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "install_command":
        return [f"pip install 'offsite-tuning[{extra}]'" for extra in texts(node.args[0], constants)]
    if isinstance(node, ast.Name) and node.id in constants:
        return texts(constants[node.id], {name: value for name, value in constants.items() if name != node.id})
    return [GAP]
