"""The pictures of a tuning: read, split into training and validation, decoded once, with their classes checked."""

from dataclasses import dataclass

import torch
from pydantic import TypeAdapter, ValidationError

from offsite.config import TuneSpec
from offsite.data.data_files import DataPaths, paths_of
from offsite.data.pictures.picture_files import Picture, load_processor
from offsite.data.pictures.picture_sets import held_out_part, read_pictures, split_by_seed
from offsite.data.pictures.picture_sizes import seen_picture
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data.pictures.prepared_pictures import Pictures
from offsite.errors import DataError, UsageError
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.model_folder import Source, read_settings
from offsite.models.modules.declared import unwrapped
from offsite.progress import Event, Progress
from offsite.protocol.contents import CONFIG
from offsite.protocol.manifest import ClassName


@dataclass(frozen=True)
class Album:
    """The decoded pictures of a tuning, for training and for validation."""

    train: Pictures
    held_out: Pictures | None
    classes: tuple[str, ...]  # names in the order of the head's outputs
    tokens: int  # number of tokens of one picture

    @property
    def rows(self) -> int:
        """The number of training pictures."""
        return len(self.train)

    @property
    def left_out(self) -> int:
        """The number of training pictures that cannot be read."""
        return len(self.train.skipped)

    @property
    def held_out_rows(self) -> int:
        """The number of held-out pictures; 0 if there are none."""
        return len(self.held_out) if self.held_out else 0

    @property
    def total_tokens(self) -> int:
        """The number of tokens of all training pictures together."""
        return self.tokens * self.rows

    @property
    def longest_row(self) -> int:
        """The number of tokens of one picture, which is the same for all pictures."""
        return self.tokens

    def labels(self, pictures: Pictures) -> torch.Tensor:
        """The index of each picture's class, (N,)."""
        number = {name: index for index, name in enumerate(self.classes)}
        return torch.tensor([number[picture.label or ""] for picture in pictures.pictures])


def open_album(
    bundle: Source,
    data: DataPaths,
    eval_data: DataPaths | None,
    spec: TuneSpec,
    progress: Progress,
    workers: PictureWorkers | None = None,
) -> Album:
    """Read and decode the pictures of a tuning.

    Args:
        bundle: the files of a model, whose image processor prepares the pictures.
        data: the training pictures; held-out pictures may be split off from these.
        eval_data: the held-out pictures, if they are a separate data set; otherwise None.
        spec: the settings of the tuning, such as the held-out share, and whether broken pictures are left out.
        progress: receives the progress events.
        workers: the worker processes that decode; None uses threads of this process.

    Raises:
        DataError: pictures or rows are invalid, there are fewer than two classes, or held-out pictures have other
            classes.
        UsageError: `eval_data` and the setting `eval_share` were both given, or that share is less than one picture.
        IncompatibleError: the bundle's image processor does not fit its model.
    """
    processor = load_processor(bundle)
    listed, held_out = _list_pictures(data, eval_data, spec)
    progress(Event("decoding the pictures", 0))
    train = Pictures(listed, processor, skip_bad=spec.images.skip_bad, workers=workers)
    validation = Pictures(held_out, processor, skip_bad=spec.images.skip_bad, workers=workers) if held_out else None
    if train.skipped or (validation and validation.skipped):
        progress(Event("bad pictures left out", len(train.skipped) + (len(validation.skipped) if validation else 0)))
    classes = _class_names(train, validation)
    config, _ = unwrapped(read_settings(bundle, CONFIG))
    tokens = seen_picture(bundle, ARCHITECTURES[config["model_type"]], config).tokens
    return Album(train, validation, classes, tokens)


def _list_pictures(data: DataPaths, eval_data: DataPaths | None, spec: TuneSpec) -> tuple[list[Picture], list[Picture]]:
    """The training pictures and the held-out pictures, before any is decoded.

    Raises:
        UsageError: `eval_data` and the setting `eval_share` were both given.
    """
    columns = spec.rows.columns
    listed = read_pictures(data, part="train", columns=columns)
    if eval_data is None and spec.images.eval_share:
        return split_by_seed(listed, spec.images.eval_share, spec.seed)
    if eval_data is None:
        with_parts = [path for path in paths_of(data) if held_out_part(path)]
        return listed, read_pictures(with_parts, part="held out", columns=columns) if with_parts else []
    if spec.images.eval_share:
        raise UsageError("held-out pictures and eval_share were both given", next_step="give one of them")
    return listed, read_pictures(eval_data, part="held out", columns=columns)


def _class_names(train: Pictures, validation: Pictures | None) -> tuple[str, ...]:
    """The sorted names of the classes, checked to be valid in a return.

    Raises:
        DataError: there are fewer than two classes, held-out pictures have other classes, or a name is not valid.
    """
    classes = tuple(sorted({picture.label or "" for picture in train.pictures}))
    untrained = {picture.label or "" for picture in validation.pictures} - set(classes) if validation else set()
    if len(classes) < 2 or untrained:
        raise DataError(
            "the pictures do not make a task of classification",
            reasons=[f"classes to train on: {', '.join(classes)[:200]}"]
            + ([f"only among the held-out ones: {', '.join(sorted(untrained))[:200]}"] if untrained else []),
            next_step="give pictures of at least two classes, and of each that is held out some to train on",
        )
    refused = [name[:40] for name in classes if not _is_returnable(name)]
    if refused:
        raise DataError(
            "names of classes that cannot be returned",
            reasons=refused,
            next_step="give the classes names of at most 128 characters, without ones that control a terminal",
        )
    return classes


def _is_returnable(name: str) -> bool:
    """Whether the manifest of a return may contain this class name."""
    try:
        TypeAdapter(ClassName).validate_python(name)
    except ValidationError:
        return False
    return True
