"""`offsite tune --check`: reads the rows or pictures as a tuning does and describes them.

Nothing is trained or written.
"""

from offsite.config import TuneSpec
from offsite.data.check_data import PictureCheck, TextCheck, check_pictures, check_text
from offsite.data.confined_tokenizer import confined_tokenizer
from offsite.data.data_files import DataPaths, Part
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data.row import RowForm
from offsite.data_owner.sent_bundle import as_sent
from offsite.data_owner.tuning_pictures import open_album
from offsite.models.tokenizers import context_length
from offsite.progress import Event, Progress
from offsite.protocol.artifacts import Bundle


def check_tuning_data(
    bundle: Bundle, data: DataPaths, eval_data: DataPaths | None, spec: TuneSpec, progress: Progress
) -> dict[str, TextCheck | PictureCheck]:
    """Read all rows or pictures that a tuning would read, and describe them.

    Args:
        bundle: the verified bundle; its tokenizer or image processor prepares the rows.
        data: the training rows.
        eval_data: the held-out rows; None if there are none.
        spec: the settings of the tuning, which say how rows are read.
        progress: receives the progress events.

    Returns:
        The descriptions, under the keys "data" and (if there are held-out rows) "eval_data".

    Raises:
        DataError: rows are invalid, or no row is left.
        IncompatibleError: the tokenizer or image processor does not fit the model.
    """
    progress(Event("reading the rows", 0))
    if bundle.manifest.family.vision is not None:
        with as_sent():
            album = open_album(bundle.files, data, eval_data, spec, progress, PictureWorkers())
        found: dict[str, TextCheck | PictureCheck] = {"data": check_pictures(data, album.train)}
        if album.held_out is not None:
            found["eval_data"] = check_pictures(data if eval_data is None else eval_data, album.held_out)
        return found
    found = {"data": _check(bundle, data, spec, "train")}
    if eval_data is not None:
        found["eval_data"] = _check(bundle, eval_data, spec, "held out")
    return found


def _check(bundle: Bundle, data: DataPaths, spec: TuneSpec, part: Part) -> TextCheck:
    """Describe one text data set, encoded by the bundle's tokenizer.

    `part` says which files are read if `data` is a folder that has separate files for training and testing.
    """
    with as_sent():
        longest = min(spec.rows.max_length, context_length(bundle.files) or spec.rows.max_length)
        with confined_tokenizer(bundle.files) as tokenizer:
            return check_text(
                data,
                tokenizer,
                bundle.files,
                form=RowForm(spec.rows.columns or {}, spec.rows.chosen),
                part=part,
                max_length=longest,
                long_rows=spec.rows.long_rows,
            )
