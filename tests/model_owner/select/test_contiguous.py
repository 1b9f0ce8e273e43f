import pytest

from offsite.errors import UsageError
from offsite.model_owner.select.contiguous import contiguous


@pytest.mark.parametrize(
    ("keep", "drop_from", "expected"),
    [
        (4, None, (2, 3, 8, 9)),
        (3, None, (2, 3, 9)),
        (1, None, (2,)),
        (8, None, tuple(range(2, 10))),
        (3, 3, (2, 8, 9)),
        (3, 2, (7, 8, 9)),
        (3, 5, (2, 3, 4)),
    ],
)
def test_one_piece_goes(keep: int, drop_from: int | None, expected: tuple[int, ...]) -> None:
    assert contiguous(range(2, 10), keep, drop_from) == expected


@pytest.mark.parametrize("drop_from", [0, 1, 6, 30])
def test_a_piece_outside_the_middle_is_refused(drop_from: int) -> None:
    with pytest.raises(UsageError, match="between 2 and 5"):
        contiguous(range(2, 10), 3, drop_from)
