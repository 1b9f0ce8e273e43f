"""Steps of errors of the verbs beside the chain: first files, answers, models of the hub, and several processes."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import nn
from transformers import LlamaForCausalLM

from gguf_files import as_gguf
from model_owner.importing.test_from_hub import Hub, Unreachable, answered
from next_steps.picture_cases import and_pictures
from next_steps.world import EVAL, IMPORT, OUT, TUNE, Case, Command, Spoil, World, as_advised, file, then
from offsite.cli import app, talk_verbs
from offsite.data_owner import prepare_model, tune
from offsite.data_owner.tuning_pictures import Album
from offsite.kernels import runtime
from offsite.study.demos.catalogue import fetch_model
from offsite.study.doctor import self_test
from offsite.training import processes
from offsite.training.launcher import Place, read_place
from offsite.training.shard_blocks import shard_blocks
from tiny import tiny_base

STREAM, HUB, INIT = "evaluation/answer_stream.py", "model_owner/importing/from_hub.py", "cli/init_verb.py"
RUNTIME, SHARDS, PREPARE = "kernels/runtime.py", "training/shard_blocks.py", "data_owner/prepare_model.py"
ASKED = "generate {folder}/base --max-tokens 2 --prompt"
FROM_HUB = "import hub:org/name --out {folder}/out"


def said(content: bytes) -> Spoil:
    """What a person types into a chat."""

    def type_in(world: World) -> None:
        world.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return type_in


def messages(world: World) -> None:
    list(talk_verbs._messages())


def refuses_to_generate(world: World) -> None:
    def fails(*_: object, **more: object) -> None:
        raise ValueError("probability tensor contains nan")

    world.patch.setattr(LlamaForCausalLM, "generate", fails)


def hub(*refusal: Exception, names: tuple[str, ...] = ()) -> Spoil:
    """A hub with the base of this world, or with GGUF files of it; or one that refuses."""

    def make(world: World) -> None:
        made = Hub(world.folder / "cache", world.patch)
        base = world.folder / "base"
        made.files = {path.name: path.read_bytes() for path in base.iterdir()}
        if names:
            made.files = dict.fromkeys(names, as_gguf(base, world.folder / "model.gguf").read_bytes())
        made.refusal = refusal[0] if refusal else None

    return make


def served(world: World, step: str) -> None:
    hub()(world)


def devices(world: World) -> None:
    """As on a machine with two cards."""
    cards = SimpleNamespace(device_count=lambda: 2, set_device=lambda device: None)
    world.patch.setattr(torch, "get_device_module", lambda device: cards)


def device(name: str, process: int) -> Command:
    return lambda world: runtime._device_of_process(torch.device(name), process)


def place(**environment: str) -> Command:
    return lambda world: read_place(environment)


def exchanged(failing: bool) -> Command:
    def run(world: World) -> None:
        with processes._connected():
            if failing:
                raise RuntimeError("Connection closed by peer")

    return run


def old_torch(world: World) -> None:
    world.patch.setattr("torch.distributed.fsdp.fully_shard", lambda module, mesh=None: module)


def sharded(world: World) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    blocks = nn.ModuleList([first, second])
    shard_blocks(blocks, blocks, [], torch.device("cpu"))


def shardable(album: bool) -> Command:
    data: Any = object.__new__(Album) if album else SimpleNamespace()
    return lambda world: prepare_model._require_shardable(data, SimpleNamespace(count=2))  # type: ignore[arg-type]


def out_of_memory(world: World) -> None:
    def fails(*_: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    world.patch.setattr(tune, "train", fails)


def less_at_once(world: World, step: str) -> str:
    world.patch.undo()
    return f"{TUNE}{OUT} --gradient-checkpointing"


def self_tested(world: World) -> None:
    folder = world.folder / "self-test"
    folder.mkdir()
    self_test._chain(folder, lambda name, step: step())


def same_losses(world: World) -> None:
    world.patch.setattr(self_test, "evaluate", lambda *_, **more: SimpleNamespace(loss=1.0))


def no_beginning(world: World) -> None:
    tiny_base(world.folder / "bare", blocks=1, bos=False)


def few_tokens(world: World) -> None:
    tiny_base(world.folder / "few", blocks=1, vocab_size=60)


def started(count: int) -> Command:
    """`offsite pack` in one of several processes that a launcher started."""

    def run(world: World) -> None:
        own = SimpleNamespace(verb="", home=None, processes=processes.Processes(Place(0, count, 0, count)))
        world.patch.setattr(app.flags, "run_of", lambda context: own)
        app._root(SimpleNamespace(invoked_subcommand="pack"))  # type: ignore[arg-type]

    return run


SERVED = then(FROM_HUB)
CASES = (
    Case(
        "packing in several processes",
        "cli/app.py",
        started(2),
        "start it without a launcher",
        lambda world, step: started(1),
    ),
    Case(
        "no party",
        INIT,
        "init --home {folder}/new --out {folder}",
        "give one of `offsite init --owner NAME`",
        then("init --owner me --home {folder}/new --out {folder}"),
    ),
    Case(
        "settings that are there",
        INIT,
        "init --owner acme --home {owner} --out {folder}",
        "name another folder with --out",
        then("init --owner acme --home {owner} --out {folder}/pictures"),
        file("offsite.toml", ""),
    ),
    Case(
        "answers of an encoder",
        "cli/talk_verbs.py",
        ASKED.replace("/base", "/encoder") + " hi",
        "name language models alone",
        then(f"{ASKED} hi"),
        and_pictures(),
    ),
    Case(
        "a message in another encoding",
        "cli/talk_verbs.py",
        messages,
        "write UTF-8",
        lambda world, step: said("Gr\u00fc\u00dfe\n".encode())(world) and None,
        said(b"\xff\xfe\n"),
        "the input is no text",
    ),
    Case(
        "a prompt in another encoding",
        "cli/talk_verbs.py",
        f"{ASKED} 'a\udcff'",
        "write UTF-8",
        then(f"{ASKED} hi"),
        what="the prompt is not UTF-8",
    ),
    Case(
        "a model that cannot generate",
        STREAM,
        f"{ASKED} hi",
        "score it with `offsite eval`",
        then(EVAL),
        refuses_to_generate,
    ),
    Case(
        "a prompt that is too long",
        STREAM,
        f"{ASKED} '{'many words ' * 40}'",
        "shorten the prompt",
        then(f"{ASKED} few"),
    ),
    Case(
        "no prompt and no beginning",
        STREAM,
        ASKED.replace("/base", "/bare") + " ''",
        "write one",
        then(ASKED.replace("/base", "/bare") + " hi"),
        no_beginning,
    ),
    Case(
        "a tokenizer of a larger model",
        STREAM,
        ASKED.replace("/base", "/few") + " quick",
        "take the tokenizer that belongs",
        then(f"{ASKED} quick"),
        few_tokens,
    ),
    Case(
        "a template that refuses a prompt",
        STREAM,
        f"{ASKED} hi",
        "without the template: --raw",
        then(f"{ASKED} hi --raw"),
        file("base/chat_template.jinja", "{{ raise_exception('no') }}"),
    ),
    Case(
        "no name of the hub",
        HUB,
        "import hub:name --out {folder}/out",
        "write it as `offsite import hub:ORG/NAME",
        SERVED,
        hub(),
    ),
    Case(
        "a model behind its terms",
        HUB,
        FROM_HUB,
        "accept them on the model's page",
        served,
        hub(answered(GatedRepoError, 403)),
    ),
    Case(
        "a model that the hub does not have",
        HUB,
        FROM_HUB,
        "check the name; for a private model",
        served,
        hub(answered(RepositoryNotFoundError, 404)),
    ),
    Case(
        "a file that a model does not have",
        HUB,
        FROM_HUB.replace("/name", "/name/b.gguf"),
        "name one of its files",
        then(FROM_HUB.replace("/name", "/name/a.gguf")),
        hub(names=("a.gguf",)),
    ),
    Case(
        "several GGUF files of the hub",
        HUB,
        FROM_HUB,
        "name one of them: `offsite import hub:",
        as_advised,
        hub(names=("a.gguf", "b.gguf")),
    ),
    Case("no network to the hub", HUB, FROM_HUB, "", served, hub(Unreachable("no route")), "its cache has no copy"),
    Case(
        "a model that the catalogue does not have",
        "study/demos/catalogue.py",
        lambda world: fetch_model("nothing", world.folder / "out"),
        "takes any other model",
        then(IMPORT),
    ),
    Case(
        "a self-test that finds no gain",
        "study/doctor/self_test.py",
        self_tested,
        "report it",
        lambda world, step: world.patch.undo() or "doctor",
        same_losses,
    ),
    Case(
        "a device for several processes",
        RUNTIME,
        device("cuda:1", 1),
        "so that every process has a device of its own",
        lambda world, step: device("cuda", 1),
        devices,
    ),
    Case(
        "more processes than devices",
        RUNTIME,
        device("cuda", 5),
        "as it has devices",
        lambda world, step: device("cuda", 1),
        devices,
    ),
    Case(
        "half of a launcher's environment",
        "training/launcher.py",
        place(RANK="0"),
        "or unset RANK",
        lambda world, step: place(),
    ),
    Case(
        "a process that is gone",
        "training/processes.py",
        exchanged(True),
        "look for the error of the process that ended first",
        lambda world, step: exchanged(False),
    ),
    Case("shards on an old torch", SHARDS, sharded, "or leave --shard out", then(TUNE + OUT), old_torch),
    Case("shards of shared blocks", SHARDS, sharded, "leave out --shard", then(TUNE + OUT)),
    Case("shards of one process", PREPARE, f"{TUNE}{OUT} --shard blocks", "or leave --shard out", then(TUNE + OUT)),
    Case(
        "shards of an encoder",
        PREPARE,
        shardable(True),
        "image encoders fit on one device",
        lambda world, step: shardable(False),
    ),
    Case(
        "a device that is full",
        "data_owner/tune.py",
        TUNE + OUT,
        "give --memory, --gradient-checkpointing",
        less_at_once,
        out_of_memory,
    ),
)
