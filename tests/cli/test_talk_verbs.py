import io
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import lora_return, packed
from offsite.cli import main
from offsite.evaluation.answer_stream import Answer, Speaker
from tiny import Parties, tiny_base, tiny_parties, tiny_vision_base


class World:
    def __init__(self, folder: Path) -> None:
        self.parties: Parties = tiny_parties(folder)
        self.base = tiny_base(folder / "base", blocks=3)
        self.bundle = packed(self.base, folder / "bundle", self.parties).folder
        from offsite.protocol.verify import verify_bundle

        verified = verify_bundle(self.bundle, self.parties.data_owner)
        self.returned = lora_return(verified, folder / "return", self.parties.data_owner).folder
        self.home = self.parties.data_owner.folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("talk"))


def run(*words: object) -> int:
    return main([str(word) for word in words])


def saying(texts: list[str]) -> Callable[..., Answer]:
    def answer(self: Speaker, turns: Any, sampling: Any, on_text: Callable[[str], None]) -> Answer:
        for text in texts:
            on_text(text)
        return Answer("".join(texts), len(texts), 0.1, True)

    return answer


def test_models_answer_one_after_the_other(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    models = [world.base, world.bundle, world.returned]
    words = ["generate", *models, "--prompt", "The fox", "--max-tokens", 9, "--home", world.home]
    assert run(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == "The fox"
    assert [one["model"] for one in found["answers"]] == [str(model) for model in models]
    base, bundle, tuned = found["answers"]
    assert base["text"] == bundle["text"] != tuned["text"]  # nothing is compressed, and the adapter is large
    assert all(1 <= one["tokens"] <= 9 for one in found["answers"])
    assert run(*words) == 0
    printed = capsys.readouterr().out
    assert [printed.index(f"── {model}\n") for model in models] == sorted(
        printed.index(f"── {model}\n") for model in models
    )


def test_a_stranger_model_does_not_reach_the_terminal(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Speaker, "answer", saying(["a\tb", "\x1b]0;title\x07\x1b[2J", "\r\u202ec\x9b31m\n"]))
    assert run("generate", world.base, "--prompt", "x") == 0
    printed = capsys.readouterr().out
    assert "a    b\\x1b]0;title\\x07\\x1b[2J\\r\\u202ec\\x9b31m\n" in printed
    assert not set(printed) & set("\x1b\x07\r\u202e\x9b\t")


def test_what_cannot_be_spoken_to(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(world.bundle, tmp_path / "bundle")
    (folder / "tokenizer.json").write_text("{}")
    assert run("generate", world.base, folder, "--prompt", "x", "--home", world.home) == 3
    assert run("generate", world.base, "--prompt", "\udcff") == 2
    assert "not UTF-8" in capsys.readouterr().err
    pytest.importorskip("PIL")
    encoder = tiny_vision_base(tmp_path / "encoder", "vit", 2)
    assert run("generate", encoder, "--prompt", "x") == 2
    assert "writes nothing" in capsys.readouterr().err


def test_a_chat_goes_on_until_its_end(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[list[str]] = []

    def answer(self: Speaker, turns: Any, sampling: Any, on_text: Callable[[str], None]) -> Answer:
        heard.append([turn["content"] for turn in turns])
        return Answer(f"answer {len(heard)}", 2, 0.1, True)

    monkeypatch.setattr(Speaker, "answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n two \n/reset\nthree\n/exit\nfour\n"))
    assert run("chat", world.base, world.base, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two", "three"]
    assert heard == [["one"], ["one"], ["one", "answer 1", "two"], ["one", "answer 2", "two"], ["three"], ["three"]]
    assert [one["text"] for one in lines[1]["answers"]] == ["answer 3", "answer 4"]


def test_one_model_at_a_time_is_in_memory(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Speaker]] = []
    load = Speaker.__init__

    def watched(self: Speaker, *words: Any, **more: Any) -> None:
        assert not any(one() for one in made)
        made.append(weakref.ref(self))
        load(self, *words, **more)

    monkeypatch.setattr(Speaker, "__init__", watched)
    assert run("generate", world.base, world.base, world.base, "--prompt", "x", "--max-tokens", 2) == 0
    assert len(made) == 3


def test_a_message_that_is_too_long_does_not_end_the_chat(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"{'x y z ' * 60}\nThe fox\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert run("chat", world.base, "--max-tokens", 5) == 0
    printed = capsys.readouterr()
    assert "at most 64" in printed.err
    assert printed.out.count(f"── {world.base}\n") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert run("chat", world.base, "--max-tokens", 5, "--json") == 2


def test_a_chat_with_a_real_model(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The fox\nand the dog\n"))
    assert run("chat", world.base, "--max-tokens", 5, "--temperature", 1, "--seed", 3) == 0
    assert capsys.readouterr().out.count(f"── {world.base}\n") == 2
