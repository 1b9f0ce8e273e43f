"""The environment of a launcher, right and wrong."""

import pytest

from offsite.errors import UsageError
from offsite.training.launcher import Place, read_place

TWO = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_without_a_launcher_there_is_one_process():
    assert read_place({"PATH": "/bin", "LOCAL_RANK": "3"}) == Place()
    assert read_place({"RANK": "0", "WORLD_SIZE": "1"}) == Place()  # as some clusters say it for every job


def test_a_launcher_says_which_process_this_is():
    assert read_place(TWO) == Place(rank=1, count=2, local_rank=1, local_count=2)
    several_machines = TWO | {"RANK": "5", "WORLD_SIZE": "8"}
    assert read_place(several_machines) == Place(rank=5, count=8, local_rank=1, local_count=2)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": "one"}, "RANK is 'one', not a number"),
        ({"RANK": "-1"}, "RANK is '-1', not a number"),
        ({"RANK": "2"}, "RANK is 2, and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, and LOCAL_WORLD_SIZE is 2"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4, and WORLD_SIZE is 2"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "MASTER_PORT is not set"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(changed, expected):
    environment = {name: value for name, value in (TWO | changed).items() if value is not None}
    with pytest.raises(UsageError) as caught:
        read_place(environment)
    assert any(expected in reason for reason in caught.value.reasons)
