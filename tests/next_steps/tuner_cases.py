"""Steps of errors that the data owner meets: data files, tuning, scores."""

import json

from artifacts import GONE
from next_steps.world import EVAL, OUT, TUNE, Case, World, as_advised, edited, file, then
from offsite.cli import main
from tiny import tiny_rows

TURNS = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})


def rows(world: World, step: str) -> None:
    tiny_rows(world.folder / "rows.jsonl", 8)


def not_utf8(world: World) -> None:
    (world.folder / "s.toml").write_bytes("[tune]\n# Gr\u00fc\u00dfe\nlr = 1e-3\n".encode("cp1252"))


def saved_again(world: World, step: str) -> None:
    (world.folder / "s.toml").write_text("[tune]\n# Gr\u00fc\u00dfe\nlr = 1e-3\n", encoding="utf-8")


def plugged(world: World) -> None:
    words = "plug-in {folder}/base {folder}/return --home {owner} --out {folder}/plugged"
    assert main(world.words(words)) == 0


CASES = (
    Case(
        "settings in another encoding",
        "config/settings_file.py",
        f"{TUNE}{OUT} --config {{folder}}/s.toml",
        "save it as UTF-8",
        saved_again,
        not_utf8,
    ),
    Case(
        "no such data",
        "data/text_files.py",
        TUNE.replace("rows.jsonl", "row.jsonl") + OUT,
        "check the path",
        then(TUNE + OUT),
    ),
    Case(
        "turns for a model without a template",
        "data/conversations/chat_template.py",
        "eval {folder}/base --data {folder}/rows.jsonl",
        'write the rows as {"prompt", "completion"}',
        rows,
        file("rows.jsonl", f"{TURNS}\n" * 4),
    ),
    Case(
        "a return in a file",
        "storage/files.py",
        f"{TUNE} --out {{folder}}/rows.jsonl/return",
        "name a folder that is not inside a file",
        then(TUNE + OUT),
    ),
    Case(
        "too high a learning rate",
        "training/loop.py",
        f"{TUNE}{OUT} --lr 1e30",
        "lower",
        then(f"{TUNE}{OUT} --lr 1e-4"),
    ),
    Case(
        "a return to score",
        "models/model_folder.py",
        "eval {folder}/return --data {folder}/rows.jsonl --home {tuner}",
        "an adapter is used with its model: `offsite eval",
        lambda world, step: f"{as_advised(world, step.replace('MODEL', 'BUNDLE'))} --data {{folder}}/rows.jsonl",
    ),
    Case(
        "a bundle as an adapter",
        "cli/verified_models.py",
        f"{EVAL} --adapter {{folder}}/bundle --home {{tuner}}",
        "name it as the model, without --adapter",
        then("eval {folder}/bundle --data {folder}/rows.jsonl --home {tuner}"),
    ),
    Case(
        "an adapter before its model",
        "cli/verified_models.py",
        "compare {folder}/return {folder}/bundle --data {folder}/rows.jsonl --home {tuner}",
        "or its bundle (of a return) before it",
        then("compare {folder}/bundle {folder}/return --data {folder}/rows.jsonl --home {tuner}"),
    ),
    Case(
        "a comparison of one model",
        "cli/compare_verb.py",
        "compare {folder}/base --data {folder}/rows.jsonl",
        "name a second model",
        lambda world, step: (
            f"{as_advised(world, step).replace('OTHER', '{folder}/bundle')} "
            "--data {folder}/rows.jsonl --home {tuner}"
        ),
    ),
    Case(
        "a return on the base",
        "evaluation/lineage.py",
        f"{EVAL} --adapter {{folder}}/return --home {{tuner}}",
        "score it on its bundle",
        as_advised,
    ),
    Case(
        "tasks in a folder, and none named",
        "cli/eval_verb.py",
        f"{EVAL} --tasks-path {{folder}}",
        "name tasks with --tasks, or leave it out",
        then(EVAL),
    ),
    Case(
        "bad pictures of a language model",
        "cli/eval_verb.py",
        f"{EVAL} --skip-bad",
        "leave --skip-bad out",
        then(EVAL),
    ),
    Case(
        "code in a model's settings",
        "models/model_folder.py",
        EVAL,
        "take these out",
        lambda world, step: edited("base/config.json", auto_map=GONE)(world),
        edited("base/config.json", auto_map={"AutoModelForCausalLM": "own.Model"}),
    ),
    Case(
        "an adapter as a model",
        "models/model_folder.py",
        "eval {folder}/plugged --data {folder}/rows.jsonl --home {owner}",
        "an adapter is used with its model: `offsite eval",
        lambda world, step: f"{as_advised(world, step)} --data {{folder}}/rows.jsonl".replace("{tuner}", "{owner}"),
        plugged,
    ),
)
