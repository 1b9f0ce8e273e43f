"""What an earlier version made goes on working: it verifies, tunes, and plugs in to the same numbers."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import offsite
from offsite import Base, Home, PlugInSpec, TuneSpec
from offsite.protocol.manifest import BundleManifest
from offsite.storage.safetensors_files import read_float32, read_header

EARLIER = Path(__file__).parent / "data" / "made-by-0.1.0"
BUNDLES = sorted(folder.name for folder in EARLIER.glob("*-bundle"))
RETURNS = sorted(folder.name for folder in EARLIER.glob("*-return"))


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    copied = Path(shutil.copytree(EARLIER, tmp_path / "earlier"))
    for key in copied.glob("*-home/key.pem"):
        key.chmod(0o600)  # git does not keep it
        for folder in (key.parent, key.parent / "trusted"):
            folder.chmod(0o700)
    return copied


def base_of(earlier: Path, name: str) -> Base:
    return Base(earlier / ("encoder" if name.startswith("encoder") else "base"))


def manifest_of(earlier: Path, bundle: str) -> BundleManifest:
    return offsite.verify_bundle(earlier / bundle, Home(earlier / "hospital-home")).manifest


def tuning(bundle: str) -> TuneSpec:
    settings: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "compute": "fp32", "device": "cpu", "threads": 1}
    return TuneSpec.model_validate(
        {**settings, "method": "full" if bundle.startswith("encoder") else "lora", "rank": 4}
    )


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_bundle_verifies_and_tunes(earlier: Path, bundle: str) -> None:
    home = Home(earlier / "hospital-home")
    received = offsite.verify_bundle(earlier / bundle, home)
    data = earlier / ("pictures" if bundle.startswith("encoder") else "rows.jsonl")
    returned = offsite.tune(received, data, earlier / "again", tuning(bundle), home)
    assert offsite.verify_return(returned.folder, Home(earlier / "acme-home"), received.manifest) == returned


@pytest.mark.parametrize("returned", RETURNS)
def test_a_return_verifies_and_plugs_in_to_the_same_numbers(earlier: Path, returned: str) -> None:
    owner = Home(earlier / "acme-home")
    offsite.verify_return(earlier / returned, owner, manifest_of(earlier, f"{returned.partition('-')[0]}-bundle"))
    taken = offsite.intake(earlier / returned, owner)
    spec = PlugInSpec(again=True)
    made = offsite.plug_in(base_of(earlier, returned), taken, earlier / "plugged", spec, owner)
    before = earlier / returned.replace("-return", "-plugged")
    assert offsite.verify(before, owner).folder == before
    files = sorted(file.name for file in before.glob("*.safetensors"))
    assert files
    for file in files:
        expected, found = read_header(before / file), read_header(made.folder / file)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(read_float32(tensor), read_float32(found[name]), err_msg=name)
