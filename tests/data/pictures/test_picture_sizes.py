"""Which pictures are taken of many."""

from pathlib import Path

import pytest

from offsite.data.pictures.picture_files import Picture
from offsite.data.pictures.picture_sizes import spread


@pytest.mark.parametrize(("listed", "count"), [(199, 100), (200, 100), (7, 3), (3, 7)])
def test_pictures_are_taken_from_all_over_the_list(listed: int, count: int) -> None:
    pictures = [Picture(str(i), Path(str(i)), None) for i in range(listed)]
    places = [pictures.index(one) for one in spread(pictures, count)]
    assert len(places) == len(set(places)) == min(count, listed)
    assert all(abs(place - i * listed / len(places)) < 1 for i, place in enumerate(places))
