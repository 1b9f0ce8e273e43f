import json
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from offsite.errors import OffsiteError
from offsite.study.run_command import run_command, settings_toml


def replaced(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """`python -m offsite ...` runs this script instead."""
    popen = subprocess.Popen

    def start(command: Sequence[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", start)


_MEASURE = """
import json, subprocess, sys
from offsite.study.run_command import run_command
popen = subprocess.Popen
script = "held = bytearray({}); held[::4096] = bytes(len(held[::4096])); import time; time.sleep({}); print(1)"
found = []
for size, pause in ((200 * 2**20, 0.3), (1, 0)):
    subprocess.Popen = lambda command, **more: popen([sys.executable, "-c", script.format(size, pause)], **more)
    done = run_command(["x"], "the test")
    found.append([done.result, done.seconds, done.peak_bytes])
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not say what a process held")
def test_seconds_and_peak_are_the_commands_own() -> None:
    """Seen from a small process, as a study is: a child's peak counts from its parent's size upwards."""
    said = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True).stdout
    large, small = json.loads(said)
    assert large[0] == 1
    assert large[1] >= 0.3 > small[1] - 0.3
    assert large[2] >= 200 * 2**20
    assert small[2] < 100 * 2**20  # the peak is not that of all children


def test_a_failed_command_is_quoted_where_there_is_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = '{"error": {"what": "no space", "reasons": ["1 byte"], "next_step": "free some"}}'
    replaced(monkeypatch, f"import sys; print('''{said}'''); print('half way', file=sys.stderr); sys.exit(4)")
    with pytest.raises(OffsiteError) as caught:
        run_command(["x"], "the test", tmp_path / "log.txt")
    assert str(caught.value) == "no space\n  - 1 byte\nNext: free some"
    assert caught.value.exit_code == 4
    assert (tmp_path / "log.txt").read_text() == "half way\n"


def test_a_command_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(OffsiteError, match="the test stopped: `offsite x` ended with exit code -9") as caught:
        run_command(["x"], "the test", tmp_path / "log.txt")
    assert caught.value.exit_code == 1


def test_settings_survive_toml() -> None:
    settings = {
        "text": 'quoted "so" \\ é', "number": 3, "rate": 1e-05, "yes": True, "nothing": None, "list": ["a", "b"],
        "empty": [], "table": {"a": 1.5, "none": None},
    }  # fmt: skip
    read = tomllib.loads(settings_toml({"pack": settings, "eval": {}}).decode())
    assert read == {
        "pack": {name: value for name, value in settings.items() if name not in ("nothing", "table")}
        | {"table": {"a": 1.5}},
        "eval": {},
    }
