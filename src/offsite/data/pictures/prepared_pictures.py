"""The pictures of a run: decoded, cropped, and prepared for one encoder; cached in memory up to a limit."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from offsite.data.pictures.picture_files import FORMATS, Floats, Picture, Pixels, Processor, augmented
from offsite.data.pictures.picture_sizes import CACHE_BYTES
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data.read_rows import counted, first
from offsite.errors import DataError


class Pictures:
    """The readable pictures of a list, prepared for one encoder. Decoded pictures remain in memory up to a limit.

    Args:
        listed: pictures from `read_pictures`. Each is decoded once at the start, to find broken pictures before any
            work.
        processor: the image processor, from `load_processor`.
        skip_bad: whether broken pictures are left out; otherwise they are an error.
        workers: the workers that decode; None uses threads of this process.

    Raises:
        DataError: pictures are broken, each listed by name, or no readable picture is left.
        OffsiteError: a worker process ended.
    """

    def __init__(
        self,
        listed: Sequence[Picture],
        processor: Processor,
        *,
        skip_bad: bool = False,
        workers: PictureWorkers | None = None,
    ) -> None:
        self._processor, self._room = processor, CACHE_BYTES
        self._workers = workers or PictureWorkers()
        self._decoded: dict[int, Pixels] = {}
        self._coming: dict[tuple[int, ...], Future[Floats]] = {}
        self.pictures: list[Picture] = []
        problems = []
        for picture, found in zip(listed, self._workers.in_order(self._tried, listed), strict=True):
            if isinstance(found, DataError):
                problems.append(f"{picture.name}: {'; '.join(found.reasons)}")
                continue
            self._keep(len(self.pictures), found)
            self.pictures.append(picture)
        self.skipped = tuple(problems)
        if problems and not (skip_bad and self.pictures):
            raise DataError(
                f"{counted(problems, 'picture')} cannot be read",
                reasons=first(problems),
                next_step="correct or remove them, or leave them out with --skip-bad"
                if self.pictures
                else f"name pictures that can be read: {', '.join(FORMATS)}",
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def _tried(self, picture: Picture) -> Pixels | DataError:
        """Decode a picture; returns the error if it cannot be read."""
        try:
            return self._workers.look(picture)
        except DataError as error:
            return error

    def _keep(self, index: int, pixels: Pixels) -> None:
        """Keep the decoded pixels of the picture with this index in memory if there is room."""
        if pixels.nbytes <= self._room:
            self._decoded[index] = pixels
            self._room -= pixels.nbytes

    def batch(self, rows: Sequence[int], key: Sequence[int] | None = None) -> Floats:
        """The given pictures as the encoder's input, (B, 3, Y, X).

        Args:
            rows: indices of the pictures.
            key: integers such as (seed, epoch); together with the index of a picture they seed its random crop and
                mirroring. None: pictures are neither cropped at random nor mirrored.

        Raises:
            DataError: a picture cannot be read any more.
            OffsiteError: a worker process ended.
        """
        self._begin(rows, key)
        coming = [self._coming[self._place(row, key)] for row in rows]
        for row in rows:
            self._coming.pop(self._place(row, key), None)
        return np.stack([one.result() for one in coming])

    def prefetch(self, rows: Sequence[int], key: Sequence[int] | None = None) -> None:
        """If there are worker processes, start to prepare pictures for a later call of `batch` with these arguments."""
        if self._workers.count:
            self._begin(rows, key)

    def _begin(self, rows: Sequence[int], key: Sequence[int] | None) -> None:
        """Submit pictures to the workers, which decode and prepare them, unless they were submitted before.

        Args:
            rows: indices of the pictures.
            key: the seed of random crops and mirroring, as for `batch`; None: no crops and no mirroring.
        """
        for place in (self._place(row, key) for row in rows):
            if place not in self._coming:
                self._coming[place] = self._workers.submit(self._prepared, place)

    def in_order(self, size: int, chosen: Sequence[int] | None = None) -> Iterator[tuple[Sequence[int], Floats]]:
        """Yield pictures without random crops, `size` at once: their indices, and the pixels (B, 3, Y, X).

        `chosen` are the indices of the pictures; None: all.
        """
        chosen = range(len(self)) if chosen is None else chosen
        for at in range(0, len(chosen), size):
            rows, after = chosen[at : at + size], chosen[at + size : at + 2 * size]
            self.prefetch(rows)
            self.prefetch(after)
            yield rows, self.batch(rows)

    @staticmethod
    def _place(row: int, key: Sequence[int] | None) -> tuple[int, ...]:
        """The key of a picture in `_coming`: (its index, then the integers of `key`); `key` None: no random crop."""
        return (row,) if key is None else (row, *key)

    def _prepared(self, place: tuple[int, ...]) -> Floats:
        """Prepare one picture for the encoder, (3, Y, X); `place` is its index and crop seed, from `_place`."""
        row, *key = place
        crop, random = (self._processor.side, [*key, row]) if key else (None, [])
        if row not in self._decoded:
            pixels = self._workers.look(self.pictures[row], crop, random)
        elif crop:
            pixels = augmented(self._decoded[row], crop, np.random.default_rng(random))
        else:
            pixels = self._decoded[row]
        return self._processor(pixels, whole=crop is not None)
