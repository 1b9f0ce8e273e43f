"""Pictures decoded in other processes: the same pictures, and nothing left behind."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from offsite.data.pictures import prepared_pictures
from offsite.data.pictures.picture_files import Picture, load_processor
from offsite.data.pictures.picture_sets import read_pictures
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data.pictures.prepared_pictures import Pictures
from offsite.errors import DataError, OffsiteError
from tiny import tiny_pictures, tiny_vision_base


def ended(workers: PictureWorkers) -> bool:
    return all(served._process.poll() is not None for served in workers._started)


def test_any_number_of_processes_makes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = load_processor(tiny_vision_base(tmp_path / "base", blocks=1))
    listed = read_pictures(tiny_pictures(tmp_path / "set", 2))
    listed[0] = Picture("bytes", Path(str(listed[0].source)).read_bytes(), listed[0].label)
    monkeypatch.setattr(prepared_pictures, "CACHE_BYTES", 3000)  # some are kept, others decoded anew
    made = []
    for count in (0, 1, 2):
        with PictureWorkers(count) as workers:
            opened = Pictures(listed, processor, workers=workers)
            opened.prefetch([4, 1], [7, 0])
            made.append([opened.batch([1, 4, 1], [7, 0]), opened.batch([1, 4, 1], [7, 1])])
            made[-1] += [found for _, found in opened.in_order(4)]
            assert 1 <= len(workers._started) <= count or not count
        assert ended(workers)
    for other in made[1:]:
        assert all((one == two).all() for one, two in zip(made[0], other, strict=True))
    assert (made[0][0][0] == made[0][0][2]).all()
    assert not np.array_equal(made[0][0], made[0][1])


def test_a_bad_picture_is_named_as_in_this_process(tmp_path: Path) -> None:
    processor = load_processor(tiny_vision_base(tmp_path / "base", blocks=1))
    folder = tiny_pictures(tmp_path / "set", 1)
    (folder / "red" / "bad.png").write_text("none")
    said = []
    for count in (0, 1):
        with PictureWorkers(count) as workers:
            with pytest.raises(DataError, match="1 picture cannot be read") as caught:
                Pictures(read_pictures(folder), processor, workers=workers)
            said.append(caught.value.reasons)
            assert len(Pictures(read_pictures(folder), processor, skip_bad=True, workers=workers)) == 3
    assert said[0] == said[1]
    assert "bad.png" in said[0][0]


def test_a_process_that_is_killed_is_an_error_and_no_wait(tmp_path: Path) -> None:
    picture = read_pictures(tiny_pictures(tmp_path / "set", 1))[0]
    with PictureWorkers(1) as workers:
        assert workers.submit(workers.look, picture).result().shape[2] == 3
        os.kill(workers._started[0]._process.pid, signal.SIGKILL)
        with pytest.raises(OffsiteError, match="a process that decodes pictures ended") as caught:
            workers.submit(workers.look, picture).result()
        assert "workers" in (caught.value.next_step or "")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_all_processes_are_left_to_who_started_them(tmp_path: Path, sent: signal.Signals) -> None:
    picture = read_pictures(tiny_pictures(tmp_path / "set", 1))[0]
    with PictureWorkers(1) as workers:
        expected = workers.submit(workers.look, picture).result()
        os.kill(workers._started[0]._process.pid, sent)
        assert (workers.submit(workers.look, picture).result() == expected).all()


def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    listed = read_pictures(tiny_pictures(tmp_path / "set", 3))
    workers = PictureWorkers(2)
    with pytest.raises(KeyboardInterrupt), workers:
        coming = [workers.submit(workers.look, picture) for picture in listed * 20]
        coming[0].result()
        os.kill(workers._started[0]._process.pid, signal.SIGINT)  # a terminal sends it to all processes
        coming[1].result()
        raise KeyboardInterrupt
    assert ended(workers)
    assert all(one.done() for one in coming)
