"""Steps of errors about pictures: scoring an image encoder, and sets of pictures."""

import shutil

import pytest

from next_steps.world import Case, Spoil, World, then

EVAL = "eval {folder}/encoder --data {folder}/pictures"
PROBE = f"{EVAL} --probe {{folder}}/pictures"
VISION_TUNE = "tune {folder}/encoder-bundle --data {folder}/pictures --home {tuner} --rank 2 --max-steps 2"
SETS, SCORES = "data/pictures/picture_sets.py", "evaluation/image_scores.py"


def and_pictures(then_spoil: Spoil = lambda world: None) -> Spoil:
    """An encoder and pictures, and what is wrong with them."""

    def make(world: World) -> None:
        pytest.importorskip("PIL")
        then_spoil(world)

    return make


def one_loose(world: World) -> None:
    shutil.copy(world.folder / "pictures" / "red" / "0.png", world.folder / "pictures" / "loose.png")


def put_into_a_class(world: World, step: str) -> None:
    shutil.move(world.folder / "pictures" / "loose.png", world.folder / "pictures" / "red" / "loose.png")


def one_broken(world: World) -> None:
    (world.folder / "pictures" / "red" / "0.png").write_bytes(b"no picture")


def none_left(world: World) -> None:
    shutil.move(world.folder / "pictures", world.folder / "moved")
    (world.folder / "pictures" / "red").mkdir(parents=True)


def moved_back(world: World, step: str) -> None:
    shutil.copytree(world.folder / "moved", world.folder / "pictures", dirs_exist_ok=True)


CASES = (
    Case(
        "words of an image model",
        "cli/eval_verb.py",
        f"{PROBE} --samples 2",
        "leave --tasks and --samples out",
        then(PROBE),
        and_pictures(),
    ),
    Case("an encoder without a classifier", SCORES, EVAL, "to fit a linear probe on", then(PROBE), and_pictures()),
    Case("a picture of no class", SETS, PROBE, "put each into a sub-folder", put_into_a_class, and_pictures(one_loose)),
    Case("no picture", SETS, PROBE, "pictures are PNG, JPEG, WebP", moved_back, and_pictures(none_left)),
    Case(
        "a file that holds no pictures",
        SETS,
        EVAL.replace("/pictures", "/rows.png"),
        "name ",
        then(PROBE),
        and_pictures(lambda world: (world.folder / "rows.png").write_text("x") and None),
        what="is not a data set of pictures",
    ),
    Case(
        "a broken picture",
        "data/pictures/prepared_pictures.py",
        PROBE,
        "or leave them out with --skip-bad",
        then(f"{PROBE} --skip-bad"),
        and_pictures(one_broken),
    ),
)
