"""Checks before a tuning begins, also used by `--plan`: they find errors before the model is loaded."""

from pathlib import Path

from offsite.config import TuneSpec
from offsite.data.data_files import DataPaths, paths_of
from offsite.data_owner.check_permissions import require_permitted, require_something_to_report
from offsite.errors import UsageError
from offsite.protocol.artifacts import Bundle
from offsite.protocol.home import Home
from offsite.protocol.output_place import require_outside, require_place
from offsite.protocol.signing import Identity, PublicKey
from offsite.storage.lock import LOCK, alone_in
from offsite.training.run_log import require_resume_asked, run_folder
from offsite.training.tensorboard import require_apart, require_tensorboard

AT_WORK = ("tuning", "wait for it or stop it")  # for the error if another process works in the run's folder


def check_tuning(
    bundle: Bundle,
    data: DataPaths,
    out: Path,
    spec: TuneSpec,
    home: Home,
    *,
    eval_data: DataPaths | None = None,
    tensorboard: Path | None = None,
    resume: bool = False,
) -> Identity:
    """Refuse a tuning that could not end in a return. No rows are read, and nothing is written.

    Args:
        bundle: the verified bundle.
        data: rows to train on.
        out: the return's folder.
        spec: the settings of the tuning.
        home: the data owner's home, with the key.
        eval_data: held-out rows; None if they are not a separate data set.
        tensorboard: a folder for an additional TensorBoard log; None for no such log.
        resume: whether to continue an interrupted run.

    Returns:
        The data owner's identity, which will sign the return.

    Raises:
        UsageError: `out` is not free, or inside the data, a model or an artifact; another tuning runs there; it has an
            interrupted run and `resume` is False; this home has no key, or not the key that the bundle is addressed to;
            losses are to be reported but there are no rows for them; settings contradict each other; or TensorBoard is
            not installed, or its folder is inside the return's folder.
        IncompatibleError: the method has nothing to train in this model.
        PolicyError: the bundle does not permit the method, the rank, the width or the head.
    """
    require_place(out, bundle.folder, paths_of(data), paths_of(eval_data) if eval_data is not None else None)
    require_something_to_report(spec, eval_data)
    if tensorboard is not None:
        require_apart(tensorboard, out)
        require_outside(tensorboard, bundle.folder, paths_of(data), flag="--tensorboard")
        require_tensorboard()
    identity = home.identity()
    require_addressed(bundle, identity)
    require_permitted(bundle.manifest, spec)
    run = run_folder(out)
    if (run / LOCK).exists():  # a run that is still working must not be reported as interrupted
        with alone_in(run, *AT_WORK):
            require_resume_asked(run, resume=resume, restartable=True)
    return identity


def require_addressed(bundle: Bundle, identity: Identity) -> None:
    """Refuse a bundle that is not addressed to this home, since its owner would refuse a return that this home signs.

    Raises:
        UsageError: this home's key is not the bundle's recipient; the home of the issuer is refused too.
    """
    own, manifest = identity.public_key, bundle.manifest
    if own.hex == manifest.recipient:
        return
    issued = own.hex == manifest.issuer
    raise UsageError(
        f"{bundle.folder} is addressed to {PublicKey.from_hex(manifest.recipient).fingerprint}, whose home alone can "
        "tune it",
        reasons=[f"this home's key is {own.fingerprint}" + (", which issued the bundle" if issued else "")],
        next_step="name the recipient's home with --home"
        + ("; to play both parties on one machine, `offsite study` has a home for each" if issued else ""),
    )
