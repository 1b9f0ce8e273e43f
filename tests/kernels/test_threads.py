from pathlib import Path

import pytest

from offsite.kernels.threads import available_cores, settle_waiting, usual_threads


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offsite.kernels.threads.available_cores", lambda: 4)
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def settled(load: Path, before: dict[str, str] | None = None) -> dict[str, str]:
    environment = dict(before or {})
    settle_waiting(environment, load)
    return environment


def loaded(folder: Path, running: int) -> Path:
    file = folder / "loadavg"
    file.write_text(f"0.19 0.11 0.04 {running}/95 2048\n", encoding="ascii")
    return file


@pytest.mark.usefixtures("four_cores")
def test_on_an_idle_machine_threads_spin_before_they_sleep(tmp_path: Path) -> None:
    environment = settled(loaded(tmp_path, running=1))  # that is us
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert int(environment["GOMP_SPINCOUNT"]) > 0


@pytest.mark.usefixtures("four_cores")
def test_beside_other_work_they_sleep(tmp_path: Path) -> None:
    assert settled(loaded(tmp_path, running=2)) == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize("text", [None, "", "0.19 0.11 0.04", "0 0 0 many/few 1"])
def test_a_system_that_does_not_tell_counts_as_busy(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "loadavg"
    if text is not None:
        file.write_text(text, encoding="ascii")
    assert settled(file) == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("said", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_user_says_stays(tmp_path: Path, said: dict[str, str]) -> None:
    assert settled(loaded(tmp_path, running=1), said) == said


def test_a_process_has_a_core() -> None:
    assert available_cores() >= 1


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("said", "threads"), [("3", 3), ("2,1", 2), (" 2 , 1", 2), ("0", 4), ("", 4), ("all", 4), ("-1", 4), (",2", 4)]
)
def test_threads_that_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch, said: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert usual_threads() == threads
