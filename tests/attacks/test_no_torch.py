"""Verifying what a stranger sent, and plugging it in, run no model: torch is not even imported."""

import subprocess
import sys

import pytest

from attacks.lab import Lab

CODE = """
import sys
from pathlib import Path
from offsite.protocol.home import Home
from offsite.protocol.verify import verify
verify(Path(sys.argv[1]), Home(Path(sys.argv[2])))
heavy = {"torch", "transformers", "peft", "accelerate", "safetensors", "pickle5"} & set(sys.modules)
assert not heavy, heavy
"""


def run(code: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("target", "home"), [("bundle", "hospital"), ("lora", "acme"), ("plugged", "acme")])
def test_verify(lab: Lab, target: str, home: str) -> None:
    run(CODE, lab.folder / target, lab.folder / f"{home}-home")


PLUG_IN = """
import sys
from pathlib import Path
from offsite import Base, Home, PlugInSpec, intake, plug_in
folder = Path(sys.argv[1])
owner = Home(folder / "acme-home")
for form in ("adapter", "merged"):
    spec = PlugInSpec(as_=form, again=True)
    plug_in(Base(folder / "base"), intake(folder / "lora", owner), folder / form, spec, owner)
plug_in(Base(folder / "base"), intake(folder / "full", owner), folder / "plugged-full", PlugInSpec(), owner)
heavy = {"torch", "transformers", "peft", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""


def test_plug_in_builds_no_model(lab: Lab) -> None:
    run(PLUG_IN, lab.folder)
    assert (lab.folder / "merged" / "model.safetensors").is_file()
