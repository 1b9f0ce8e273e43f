"""The checks before a tuning begins, also used by `--plan`: whatever the run would refuse, without running it."""

from pathlib import Path

from offsite.config import TuneSpec
from offsite.data.data_files import DataPaths
from offsite.data_owner.permissions import require_permitted, require_something_to_report
from offsite.errors import UsageError
from offsite.protocol.artifacts import Bundle
from offsite.protocol.home import Home
from offsite.protocol.signing import Identity, PublicKey
from offsite.storage.files import require_free
from offsite.storage.lock import LOCK, alone_in
from offsite.training.run_log import require_resume_asked, run_folder
from offsite.training.tensorboard import require_outside, require_tensorboard

AT_WORK = ("tuning", "wait for it or stop it")  # what holds the run's folder, and what to do then


def check_tuning(
    bundle: Bundle,
    out: Path,
    spec: TuneSpec,
    home: Home,
    *,
    eval_data: DataPaths | None = None,
    tensorboard: Path | None = None,
    resume: bool = False,
) -> Identity:
    """Refuse a tuning that could not end in a return; the rows are not read, and nothing is written.

    Args:
        bundle: verified.
        out: the return's folder.
        spec: what trains and how.
        home: the data owner's.
        eval_data: rows to validate on.
        tensorboard: a folder to log to for TensorBoard as well.
        resume: whether an interrupted run is to be continued.

    Returns:
        The data owner's identity, which will sign the return.

    Raises:
        UsageError: `out` holds something, another tuning is at work there, or an interrupted one that was not to be
            resumed; this home has no key, or another one than the bundle is addressed to; losses are to be reported and
            there are no rows to measure them on; settings do not go together; or TensorBoard is not installed, or is to
            log into the folder of the return.
        IncompatibleError: the method has nothing to train in this model.
        PolicyError: the bundle does not permit the method, the rank, the width or the head.
    """
    require_free(out)
    require_something_to_report(spec, eval_data)
    if tensorboard is not None:
        require_outside(tensorboard, out)
        require_tensorboard()
    identity = home.identity()
    require_addressed(bundle, identity)
    require_permitted(bundle.manifest, spec)
    run = run_folder(out)
    if (run / LOCK).exists():  # of a run that still works it is not true that it was interrupted
        with alone_in(run, *AT_WORK):
            require_resume_asked(run, resume=resume, restartable=True)
    return identity


def require_addressed(bundle: Bundle, identity: Identity) -> None:
    """Refuse a bundle that was verified in another home, and whose return the owner would refuse.

    Raises:
        UsageError: this party is neither its recipient nor its issuer.
    """
    own, manifest = identity.public_key.hex, bundle.manifest
    if own not in (manifest.recipient, manifest.issuer):
        raise UsageError(
            f"{bundle.folder} is addressed to {PublicKey.from_hex(manifest.recipient).fingerprint}",
            reasons=[f"this home's key is {identity.public_key.fingerprint}"],
            next_step="name the home that the bundle was verified in",
        )
