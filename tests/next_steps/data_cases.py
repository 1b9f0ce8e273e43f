"""Steps of errors about data: files, rows, tokens, pictures, and the packages that read them."""

import json
import os
import shlex
import signal

from data.test_whole_encoding import Turning, encoded
from next_steps.picture_cases import PROBE, VISION_TUNE, and_pictures
from next_steps.world import EVAL, OUT, TUNE, Case, Spoil, World, edited, file
from offsite import extras
from offsite.data.data_files import data_digest
from offsite.data.pictures.picture_sets import read_pictures
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data.row import Row
from tiny import tiny_rows
from tokenizer_kinds import tokenizer_of

PROCESSOR = "encoder/preprocessor_config.json"
SYSTEM = '{% if messages[0].role == "system" %}{{ raise_exception("no system words") }}{% endif %}'
TEMPLATE = SYSTEM + "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
PAIR = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def downloaded(world: World, step: str) -> str:
    """What `hf download` does, with rows that are here."""
    words = shlex.split(step.partition(", then name that folder")[0])
    assert words[:5] == ["hf", "download", "--repo-type", "dataset", "someone/nothing"]
    folder = world.folder / words[words.index("--local-dir") + 1]
    tiny_rows(folder / "train.jsonl", 8)
    return TUNE.replace("rows.jsonl", folder.name) + OUT


def pipe(world: World) -> None:
    os.mkfifo(world.folder / "pipe")


def two_trainings(world: World) -> None:
    for name in ("train_sft", "train_gen", "test_sft", "test_gen"):
        tiny_rows(world.folder / "set" / f"{name}.jsonl", 4)


def by_pattern(world: World, step: str) -> str:
    return f"{TUNE.replace('{folder}/rows.jsonl', step.rpartition(': ')[2])}{OUT}"


def half_utf16(world: World) -> None:
    (world.folder / "text.txt").write_bytes(b"\xff\xfe" + "some words, ".encode("utf-16-le") * 30 + b"x")


def in_utf8(world: World, step: str) -> None:
    (world.folder / "text.txt").write_text("some words, " * 30, encoding="utf-8")


def with_system_words(world: World) -> None:
    (world.folder / "base" / "chat_template.jinja").write_text(TEMPLATE)
    turns = [{"role": "system", "content": "be kind"}, *PAIR]
    (world.folder / "rows.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)


def in_the_first_turn(world: World, step: str) -> None:
    assert "at the start of the first user turn" in step
    turns = [{**PAIR[0], "content": "be kind\n\na"}, PAIR[1]]
    (world.folder / "rows.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)


def longer_than(length: int) -> Spoil:
    def write(world: World) -> None:
        row = json.dumps({"prompt": "a b c d", "completion": "b c d e " * 10})
        (world.folder / "rows.jsonl").write_text(f"{row}\n" * 4)
        (world.folder / "s.toml").write_text(f'[tune]\nmax_length = {length}\nlong_rows = "skip"\n')

    return write


def cut_instead(world: World, step: str) -> None:
    (world.folder / "s.toml").write_text('[tune]\nmax_length = 16\nlong_rows = "truncate"\n')


def processor(**settings: object) -> Spoil:
    """The image processor's settings, changed."""
    return and_pictures(lambda world: edited(PROCESSOR, **settings)(world))


def right_size(world: World, step: str) -> None:
    edited(PROCESSOR, size={"height": 16, "width": 16}, image_processor_type="ViTImageProcessor")(world)


def decoded_elsewhere(world: World) -> None:
    picture = read_pictures(world.folder / "pictures")[0]
    with PictureWorkers(1) as workers:
        workers.submit(workers.look, picture).result()
        os.kill(workers._started[0]._process.pid, signal.SIGKILL)  # as a system that is out of memory does
        workers.submit(workers.look, picture).result()


def decoded_here(world: World) -> None:
    with PictureWorkers(0) as workers:
        workers.submit(workers.look, read_pictures(world.folder / "pictures")[0]).result()


def table_of_other_columns(world: World) -> None:
    pictures = sorted((world.folder / "pictures").glob("*/*.png"))
    lines = [f"{path.relative_to(world.folder)},{path.parent.name}\n" for path in pictures]
    (world.folder / "table.csv").write_text("path,label\n" + "".join(lines) + "pictures/red/0.png,\n")


def labelled(world: World, step: str) -> None:
    table = world.folder / "table.csv"
    table.write_text(table.read_text().removesuffix("pictures/red/0.png,\n"))


def without(module: str) -> Spoil:
    """As if a package was not installed."""

    def hide(world: World) -> None:
        load = extras.importlib.import_module  # type: ignore[attr-defined]

        def missing(name: str) -> object:
            if name == module:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return load(name)

        world.patch.setattr(extras.importlib, "import_module", missing)  # type: ignore[attr-defined]

    return hide


def installed(world: World, step: str) -> None:
    """What `pip install` does, where `without` has hidden the package."""
    assert step.startswith("pip install ")
    world.patch.undo()


def eval_share(world: World, share: float) -> None:
    (world.folder / "s.toml").write_text(f"[tune]\neval_share = {share}\n")


CASES = (
    Case(
        "a data set of the hub",
        "data/data_files.py",
        TUNE.replace("{folder}/rows.jsonl", "someone/nothing") + OUT,
        "hf download --repo-type dataset",
        downloaded,
    ),
    Case(
        "rows out of a pipe",
        "data/data_files.py",
        lambda world: data_digest(world.folder / "pipe"),
        "write the rows into a file",
        lambda world, step: lambda world: data_digest(world.folder / "rows.jsonl"),
        pipe,
    ),
    Case(
        "two training parts",
        "data/data_files.py",
        TUNE.replace("rows.jsonl", "set") + OUT,
        "name the files, with a pattern in quotes",
        by_pattern,
        two_trainings,
    ),
    Case(
        "tokens that the model does not know",
        "data/examples.py",
        EVAL,
        "a tokenizer that fits the model",
        lambda world, step: edited("base/config.json", vocab_size=320)(world),
        edited("base/config.json", vocab_size=60),
    ),
    Case(
        "half a character",
        "data/text_files.py",
        TUNE.replace("rows.jsonl", "text.txt") + OUT,
        "save it as UTF-8",
        in_utf8,
        half_utf16,
    ),
    Case(
        "words of a system",
        "data/tokens.py",
        EVAL,
        "correct these rows",
        in_the_first_turn,
        with_system_words,
    ),
    Case(
        "all rows are too long",
        "data/tokens.py",
        f"{TUNE}{OUT} --config {{folder}}/s.toml",
        "raise --max-length, or cut rows",
        cut_instead,
        longer_than(16),
    ),
    Case(
        "no row has an answer",
        "data/tokens.py",
        TUNE + OUT,
        "write rows with an answer",
        lambda world, step: tiny_rows(world.folder / "rows.jsonl", 4) and None,
        file("rows.jsonl", '{"instruction": "a", "output": ""}\n' * 4),
    ),
    Case(
        "a slow tokenizer",
        "data/whole_encoding.py",
        lambda world: encoded([Row(1, "The quick brown", " fox")], Turning()),
        "put a fast tokenizer",
        lambda world, step: lambda world: encoded([Row(1, "The quick brown", " fox")], tokenizer_of("byte level")),
    ),
    Case(
        "no such image processor",
        "data/pictures/picture_files.py",
        PROBE,
        "check preprocessor_config.json",
        right_size,
        processor(image_processor_type="NoneProcessor"),
    ),
    Case(
        "pictures of another size",
        "data/pictures/picture_files.py",
        PROBE,
        "one height and width",
        right_size,
        processor(size={"height": 32, "width": 32}),
    ),
    Case(
        "pictures of no size",
        "data/pictures/picture_sizes.py",
        "pack {folder}/encoder --for hospital --home {owner} --bottom 1 --top 1 --keep 1 --heal none" + OUT,
        "name height and width as size",
        right_size,
        processor(size={"shortest_edge": 16}),
    ),
    Case(
        "a table with a picture of no class",
        "data/pictures/picture_sets.py",
        PROBE.replace("/pictures", "/table.csv"),
        "name the columns, such as",
        labelled,
        and_pictures(table_of_other_columns),
    ),
    Case(
        "too few held-out pictures",
        "data/pictures/picture_sets.py",
        f"{VISION_TUNE}{OUT} --config {{folder}}/s.toml",
        "raise eval_share, leave it out",
        lambda world, step: eval_share(world, 0.5),
        and_pictures(lambda world: eval_share(world, 0.01)),
    ),
    Case(
        "a process that was ended",
        "data/pictures/picture_workers.py",
        decoded_elsewhere,
        "0 decodes in the process that tunes",
        lambda world, step: decoded_here,
        and_pictures(),
    ),
    Case(
        "a package that is not installed",
        "extras.py",
        PROBE,
        "pip install",
        installed,
        and_pictures(without("PIL.Image")),
    ),
)
