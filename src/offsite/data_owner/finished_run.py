"""What a finished tuning records in its log, and whether a run that is to be resumed is that one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offsite.errors import OffsiteError, UsageError
from offsite.protocol.artifacts import Return
from offsite.protocol.home import Home
from offsite.protocol.verify import verify_return
from offsite.training.run_identity import list_differences, read_identity
from offsite.training.run_log import last_record, log_file, run_folder, run_log

FINISHED = "finished"  # the event of the log


def record_finished(returned: Return, identity: Mapping[str, object]) -> None:
    """Record in the log of a run that it is finished.

    Args:
        returned: the return that the run made.
        identity: settings, bundle and data of the run, by name.

    Raises:
        StorageError: the log cannot be written.
    """
    with run_log(log_file(returned.folder)) as write:
        write({"event": FINISHED, "return": returned.digest, "run": dict(identity)})


def own_return(out: Path, home: Home) -> Return | None:
    """The return in the folder `out` that this home signed; None if `out` holds anything else, or a changed one."""
    try:
        returned = verify_return(out, home)
    except OffsiteError:  # the checks before a tuning report what is there
        return None
    return returned if returned.manifest.signer == home.identity().public_key.hex else None


def require_same_finished_run(returned: Return, identity: Mapping[str, object]) -> None:
    """Refuse to resume a finished run with other settings, another bundle or other data.

    Args:
        returned: the return that the run made.
        identity: settings, bundle and data of the run that was asked for, by name.

    Raises:
        UsageError: they differ, or the log of the finished run is missing, so that they cannot be compared.
    """
    out, log = returned.folder, log_file(returned.folder)
    saved = _saved_identity(returned)
    if saved is None:
        raise UsageError(
            f"{out} holds a return, and {log} does not say which settings and data made it",
            next_step="put the run's log back next to it, or name another folder with --out",
        )
    different = list_differences(saved, identity, "the finished run")
    if different:
        raise UsageError(
            f"the run that made {out} is finished, and it is another one",
            reasons=different,
            next_step="name another folder with --out to tune again, or give the same settings, bundle and data",
        )


def _saved_identity(returned: Return) -> Mapping[str, Any] | None:
    """What identifies the run that made a return, by name; None if that is not recorded any more.

    It is in the log. If the run was interrupted just after it had written the return, it is with its resume points.
    """
    record = last_record(log_file(returned.folder), FINISHED) or {}
    if record.get("return") == returned.digest and isinstance(record.get("run"), dict):
        saved: dict[str, Any] = record["run"]
        return saved
    return read_identity(run_folder(returned.folder))
