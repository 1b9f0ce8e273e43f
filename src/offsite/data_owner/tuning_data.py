"""Reads the data of a tuning: text is tokenised by the bundle's tokenizer, pictures are decoded."""

from dataclasses import dataclass

from offsite.config import TuneSpec
from offsite.data.confined_tokenizer import confined_tokenizer
from offsite.data.data_files import DataPaths, Part, name_of
from offsite.data.examples import Encoded, Example, require_known
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data.read_rows import read_rows
from offsite.data.row import RowForm
from offsite.data.tokens import encode
from offsite.data_owner.sent_bundle import as_sent
from offsite.data_owner.tuning_pictures import Album, open_album
from offsite.models.tokenizers import context_length
from offsite.progress import Event, Progress
from offsite.protocol.artifacts import Bundle


@dataclass(frozen=True)
class TextData:
    """The tokenised rows of a tuning on text, for training and for validation."""

    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]  # may be empty
    left_out: int  # training rows that are too long or have no label

    @property
    def rows(self) -> int:
        """The number of training rows."""
        return len(self.examples)

    @property
    def held_out_rows(self) -> int:
        """The number of held-out rows."""
        return len(self.held_out)

    @property
    def total_tokens(self) -> int:
        """The number of tokens of all training rows together."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def longest_row(self) -> int:
        """The number of tokens of the longest training row."""
        return max(len(example.ids) for example in self.examples)

    @property
    def classes(self) -> None:
        """Always None, since text has no classes."""
        return None


def read_data(
    bundle: Bundle,
    data: DataPaths,
    eval_data: DataPaths | None,
    spec: TuneSpec,
    progress: Progress,
    workers: PictureWorkers,
) -> TextData | Album:
    """Read the rows or pictures of a tuning, before the bundle's model is loaded.

    Args:
        bundle: the verified bundle; its tokenizer or image processor prepares the rows.
        data: the training rows.
        eval_data: the held-out rows; None if there are none.
        spec: the settings of the tuning, such as the largest length of a row, and what happens to longer rows and
            broken pictures.
        progress: receives the progress events.
        workers: the worker processes that decode pictures.

    Raises:
        DataError: rows are invalid, too long, or missing.
        UsageError: for pictures, `eval_data` and the setting `eval_share` were both given.
        IncompatibleError: the tokenizer or image processor does not fit the model.
    """
    if bundle.manifest.family.vision is not None:
        with as_sent():
            return open_album(bundle.files, data, eval_data, spec, progress, workers)
    train = _encode(bundle, data, spec, progress, "train")
    held_out = _encode(bundle, eval_data, spec, progress, "held out").examples if eval_data is not None else ()
    return TextData(train.examples, held_out, train.skipped)


def _encode(bundle: Bundle, data: DataPaths, spec: TuneSpec, progress: Progress, part: Part) -> Encoded:
    """Read and tokenise one text data set, and report the rows that are left out.

    `part` says which files are read if `data` is a folder that has separate files for training and testing.
    """
    rows = read_rows(data, RowForm(spec.rows.columns or {}, spec.rows.chosen), part)
    with as_sent():
        longest = min(spec.rows.max_length, context_length(bundle.files) or spec.rows.max_length)
        with confined_tokenizer(bundle.files) as tokenizer:
            encoded = encode(rows, tokenizer, source=data, max_length=longest, long_rows=spec.rows.long_rows)
    require_known(encoded.examples, bundle.files, data)
    if encoded.skipped:
        what = f"rows of {name_of(data)} left out, too long or without a label"
        progress(Event(what, encoded.skipped, encoded.skipped + len(encoded.examples)))
    for what in encoded.reports():
        progress(Event(what, 0))
    return encoded
