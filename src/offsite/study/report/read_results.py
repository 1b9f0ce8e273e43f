"""Reads the results.json of a study that was run or reported before."""

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from offsite.errors import UsageError
from offsite.study.report.results import Results


def read_results(file: Path) -> Results:
    """Read the results of a study.

    Args:
        file: the file results.json in the study's folder.

    Raises:
        UsageError: the file cannot be read, or holds no results of a study in this version's form.
    """
    try:
        return TypeAdapter(Results).validate_json(file.read_bytes())
    except OSError as error:
        what, reasons = f"cannot read {file}", [str(error.strerror)]
    except ValidationError as error:
        what = f"{file} holds no results of a study in the form of this version"
        problems = error.errors(include_url=False, include_input=False)[:4]
        reasons = [f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}" for problem in problems]
    raise UsageError(
        what,
        reasons=reasons,
        next_step=f"write it again with `offsite study RECIPE.toml --out {file.parent} --report-only`",
    )
