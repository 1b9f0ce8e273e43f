import pytest

from offsite.kernels.threads import available_cores, usual_threads


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offsite.kernels.threads.available_cores", lambda: 4)
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def test_a_process_has_a_core() -> None:
    assert available_cores() >= 1


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("said", "threads"), [("3", 3), ("2,1", 2), (" 2 , 1", 2), ("0", 4), ("", 4), ("all", 4), ("-1", 4), (",2", 4)]
)
def test_threads_that_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch, said: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert usual_threads() == threads
