"""A hostile owner signs bundles in which one value is wrong: every command ends with a documented exit code."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts import packed
from attacks.hostile_bundles import CODES, Mutation, commands, mutations, run_all, spoil
from offsite.storage.checkpoint_folder import WEIGHTS
from tiny import KINDS, VISION_KINDS, MakeBase, Parties, tiny_pictures, tiny_rows, tiny_vision_base

SAMPLE = 8  # of the changes of one bundle in the usual run
FOUND = (  # what once ended in a traceback, or asked for gigabytes
    Mutation("config.json", ("rope_parameters", "rope_theta"), False),
    Mutation("config.json", ("rms_norm_eps",), -0.5),
    Mutation("config.json", ("attention_dropout",), 2.0),
    Mutation("config.json", ("max_position_embeddings",), 2**23),
    Mutation("tokenizer_config.json", ("tokenizer_class",), "RagTokenizer"),
    Mutation("tokenizer_config.json", ("chat_template",), "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    Mutation(WEIGHTS, (), float("nan")),
)


@pytest.fixture
def try_all(parties: Parties, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """`try_all(bundle, mutations, data)`: run the commands on every changed bundle."""

    def run(bundle: Path, changes: list[Mutation], data: Path) -> None:
        for number, mutation in enumerate(changes):
            made, out = spoil(bundle, tmp_path / f"spoiled-{number}", mutation, parties), tmp_path / f"out-{number}"
            codes, trace = run_all(commands(made, data, parties.data_owner.folder, out))
            assert not trace, f"{mutation}\n{trace}"
            assert CODES.issuperset(codes), mutation
            said = capsys.readouterr()
            assert "\x1b[31m" not in said.out + said.err, mutation

    return run


def test_what_was_found(base_of: MakeBase, parties: Parties, tmp_path: Path, try_all: Callable[..., None]) -> None:
    bundle = packed(base_of("llama", 4, tied=True), tmp_path / "bundle", parties).folder
    try_all(bundle, list(FOUND), tiny_rows(tmp_path / "rows.jsonl", 4))


def test_a_sample(base_of: MakeBase, parties: Parties, tmp_path: Path, try_all: Callable[..., None]) -> None:
    bundle = packed(base_of("gpt2", 3), tmp_path / "bundle", parties).folder
    changes = random.Random(5).sample(list(mutations(bundle)), SAMPLE)
    try_all(bundle, changes, tiny_rows(tmp_path / "rows.jsonl", 4))


@pytest.mark.every_form
@pytest.mark.parametrize("kind", [*KINDS, *VISION_KINDS])
def test_every_form(
    kind: str, base_of: MakeBase, parties: Parties, tmp_path: Path, try_all: Callable[..., None]
) -> None:
    """Some hundred changes of a bundle of every form; the seed goes by the form."""
    if kind in VISION_KINDS:
        base, data = tiny_vision_base(tmp_path / "base", kind, 3), tiny_pictures(tmp_path / "data", 2)
    else:
        settings = dict(KINDS[kind])
        base, data = base_of(settings.pop("family"), 3, **settings), tiny_rows(tmp_path / "rows.jsonl", 4)
    bundle = packed(base, tmp_path / "bundle", parties).folder
    every = list(mutations(bundle))
    try_all(bundle, random.Random(kind).sample(every, min(300, len(every))), data)
