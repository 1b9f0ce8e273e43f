"""Refitting, pruning and narrowing hold one block: a limit of the operating system, far below the model, is enough."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.hollow_base import SIZES
from benchmarks.large_base import write_base

from offsite.storage.checkpoint_folder import open_checkpoint
from tiny import Parties, tiny_base

LIMIT = 64 * 2**20
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_hidden_layers": 64, "vocab_size": 512,
}  # fmt: skip
CHILD = """
import json, re, resource, sys
from pathlib import Path
from offsite.config import PackSpec
from offsite.model_owner.pack import pack
from offsite.protocol.artifacts import Base
from offsite.protocol.home import Home

tiny, base, out, home, limit = *map(Path, sys.argv[1:5]), int(sys.argv[5])
kinds = ({"prune": 0.5, "heal": "refit"}, {"narrow": 0.5, "heal": "refit"}, {"keep": 3, "heal": "refit"})

def packing(base, out):
    quarter = json.loads((base / "config.json").read_text())["num_hidden_layers"] // 4
    for number, kind in enumerate(kinds):
        usual = {"bottom": quarter, "top": quarter, "calibration_tokens": 512, "compute": "fp32", "device": "cpu"}
        pack(Base(base), out / str(number), "hospital", PackSpec.model_validate({**usual, **kind}), Home(home))

packing(tiny, out / "tiny")  # what libraries allocate once is not counted
held = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + limit, held + limit))
packing(base, out)
"""


@pytest.mark.every_form  # a process of its own that heals 80 blocks
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts all private memory of a process as its data")
def test_healing_block_by_block_stays_below_a_limit(
    parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "test", SHAPE)
    write_base(tmp_path / "base", "test", None)
    assert 2 * open_checkpoint(tmp_path / "base").size > 2 * LIMIT  # in float32, as blocks run
    tiny = tiny_base(tmp_path / "tiny", blocks=8)
    places = [tiny, tmp_path / "base", tmp_path / "out", parties.owner.folder, LIMIT]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, places)],
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
