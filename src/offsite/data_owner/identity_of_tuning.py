"""What identifies a tuning: it is only resumed with the same settings, bundle and data."""

from offsite.config import TuneSpec
from offsite.data.data_files import DataPaths, data_digest
from offsite.data.pictures.picture_sets import pictures_digest, read_pictures
from offsite.kernels.runtime import Runtime
from offsite.protocol.artifacts import Bundle

# Settings that do not change the result, so a resumed run may have other values.
_FREE_SETTINGS = frozenset({"save_every", "eval_every", "threads", "workers"})


def identity_of_tuning(
    bundle: Bundle, data: DataPaths, eval_data: DataPaths | None, spec: TuneSpec, runtime: Runtime, *, several: bool
) -> dict[str, object]:
    """Settings, bundle and data of a run, by name. A run is only resumed if all of these are the same.

    `several` says whether it runs in several processes.
    """
    settings = spec.flat(without=_FREE_SETTINGS)
    device = runtime.device.type if several else str(runtime.device)  # each of several processes has its own
    resolved = {"device": device, "compute": str(runtime.dtype)}
    reported = {"eval_data": data_digest(eval_data)} if eval_data and spec.points.report_scores else {}
    if bundle.manifest.family.vision is None:
        digest = data_digest(data)
    else:  # the content of the picture files counts, since a table of pictures holds only their names
        digest = pictures_digest(read_pictures(data, part="train", columns=spec.rows.columns))
    return {**settings, **resolved, "bundle": bundle.digest, "data": digest, **reported}
