"""Compares emulators that were healed on photos of an installed package and on the owner's own pictures.

    python -m benchmarks.calibration_pictures --base ENCODER --own FOLDER --tested FOLDER

Three bundles of one encoder are made: not healed, healed on the installed photos, and healed on as many of the owner's
pictures. For each, two figures are computed on pictures that were not used for healing: the relative error of the
hidden states after the emulator, and the accuracy of a linear probe. Needs the extra calibration-images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Pack and measure each bundle, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--own", type=Path, required=True, help="pictures to heal on and to fit the probe on, by class")
    parser.add_argument("--tested", type=Path, required=True, help="other pictures, by class")
    parser.add_argument("--pictures", type=int, default=500, help="to fit the probe on, and at most as many to test on")
    parser.add_argument("--split", type=int, nargs=3, default=(0, 4, 4), metavar=("BOTTOM", "KEEP", "TOP"))
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration: 256 pictures of 64 patches")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="offsite-calibration-") as scratch:
        _compare(wanted, Path(scratch))


def _compare(wanted: argparse.Namespace, scratch: Path) -> None:
    """Pack the three bundles into the folder `scratch`; print the error and the probe's accuracy of each."""
    home = scratch / "acme"
    _offsite("keygen", "--name", "acme", "--out", scratch / "acme.pub", "--home", home)
    _offsite("trust", "add", "acme", scratch / "acme.pub", "--home", home)  # a recipient is needed; nobody reads it
    heal, probe = _lists(wanted.own, wanted.pictures, scratch)
    tested = _list(wanted.tested, wanted.pictures, scratch / "tested.csv")
    settings, (bottom, keep, top) = scratch / "settings.toml", wanted.split
    settings.write_text(f"[pack]\ncalibration_tokens = {wanted.tokens}\n")
    target = _leaving(wanted.base, tested, lambda blocks: blocks - top - 1)
    for name, words in (
        ("not healed", ["--heal", "none"]),
        ("healed on installed photos", ["--heal", "refit"]),
        ("healed on own pictures", ["--heal", "refit", "--calibration", heal]),
    ):
        out = scratch / name.replace(" ", "-")
        split = ["--bottom", bottom, "--keep", keep, "--top", top, "--config", settings]
        _offsite("pack", wanted.base, "--out", out, "--for", "acme", "--home", home, *split, *words)
        found = _leaving(out, tested, lambda blocks: blocks - top - 1)
        error = float(np.linalg.norm(found - target) / np.linalg.norm(target))
        score = _offsite("eval", out, "--probe", probe, "--data", tested)
        print(f"{name:28} hidden error {error:.3f}  probe {score['accuracy']:.1%} of {score['rows']}", flush=True)


def _lists(own: Path, count: int, scratch: Path) -> tuple[Path, Path]:
    """Write two CSV files without common pictures: `count` pictures with classes for the probe, the others to heal on.

    Returns:
        The file to heal on, then the file for the probe.
    """
    from offsite.data.pictures.picture_sets import read_pictures

    listed = read_pictures(own.resolve())
    order = np.random.default_rng(0).permutation(len(listed)).tolist()
    fitted, others = order[:count], order[count:]
    heal = scratch / "heal.csv"
    heal.write_text("path\n" + "".join(f"{listed[i].source}\n" for i in others))
    return heal, _write([listed[i] for i in fitted], scratch / "probe.csv")


def _list(folder: Path, count: int, file: Path) -> Path:
    """Write at most `count` pictures of a folder, drawn at random, to the CSV file `file`; returns it."""
    from offsite.data.pictures.picture_sets import read_pictures

    listed = read_pictures(folder.resolve())
    return _write([listed[i] for i in np.random.default_rng(1).permutation(len(listed)).tolist()[:count]], file)


def _write(pictures: Any, file: Path) -> Path:
    """Write the paths and classes of pictures to a CSV file; returns it."""
    file.write_text("path,label\n" + "".join(f"{one.source},{one.label}\n" for one in pictures))
    return file


def _leaving(folder: Path, data: Path, block: Any) -> Any:
    """Run a model on pictures; returns the hidden states after one block, (N * T, H).

    Args:
        folder: the model's folder.
        data: a CSV file of pictures.
        block: takes the number of blocks, and returns the index of the block (from 0).
    """
    import torch

    from offsite.data.pictures.picture_files import load_processor
    from offsite.data.pictures.picture_sets import read_pictures
    from offsite.data.pictures.prepared_pictures import Pictures
    from offsite.models.families.architectures import ARCHITECTURES
    from offsite.models.loading import load_model

    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    family = ARCHITECTURES[model.config.model_type]
    blocks = model.get_submodule(family.module_blocks or family.blocks)
    seen = []
    blocks[block(len(blocks))].register_forward_hook(
        lambda _, __, output: seen.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1).numpy())
    )
    with torch.no_grad():
        for _, pixels in Pictures(read_pictures(data), load_processor(folder)).in_order(32):
            model(pixel_values=torch.from_numpy(pixels))
    return np.concatenate(seen)


def _offsite(*words: object) -> dict[str, Any]:
    """Run an `offsite` command; returns its JSON result."""
    command = [sys.executable, "-m", "offsite", *map(str, words), "--json"]
    done = subprocess.run(command, check=False, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{words}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout) if done.stdout.strip() else {}


if __name__ == "__main__":
    main()
