"""Steps of errors about bundles that only somebody hostile makes: the owner is asked for another one, which works."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from artifacts import edit_bundle_weights, edit_json, packed_unopened, sign_again
from next_steps.tuner_cases import TURNS
from next_steps.world import EVAL, OUT, TUNE, Case, Command, Spoil, World, then
from offsite.data import confined_tokenizer
from tiny_types import tiny_type_base

LOADING, WORKER = "models/loading.py", "data/confined_tokenizer.py"
HOSTILE = f"{EVAL.replace('/base', '/hostile')} --home {{tuner}}"
ANOTHER = then(HOSTILE.replace("/hostile", "/bundle"))
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def signed(change: Callable[[Path], object] = lambda folder: None, bundle: str = "bundle") -> Spoil:
    """A copy of a bundle with a change in its files, which its owner signs."""

    def make(world: World) -> None:
        folder = Path(shutil.copytree(world.folder / bundle, world.folder / "hostile"))
        change(folder)
        sign_again(folder, world.parties.owner.identity())

    return make


def asking(template: str) -> Spoil:
    """Rows that a chat template writes, and a bundle with this one."""

    def make(world: World) -> None:
        (world.folder / "rows.jsonl").write_text(f"{TURNS}\n" * 4)
        signed(lambda folder: (folder / "chat_template.jinja").write_text(template))(world)

    return make


def sound_template(world: World, step: str) -> None:
    """Another bundle of that owner, with a template that ends."""
    world.patch.undo()
    shutil.rmtree(world.folder / "hostile")
    asking(TEMPLATE)(world)


def not_finite(folder: Path) -> None:
    edit_bundle_weights(folder, lambda held: next(iter(held.values())).fill(float("nan")))


def declared(world: World) -> None:
    """A type without a row in the table: which of its settings cost memory is not known."""
    base = tiny_type_base(world.folder / "olmo", "olmo2", 3)
    packed_unopened(base, world.folder / "declared", world.parties)
    signed(lambda folder: edit_json(folder / "config.json", vocab_size=2**22), "declared")(world)


def impatient(world: World) -> None:
    """As if most of a template's minute had passed."""
    world.patch.setattr(confined_tokenizer, "_SECONDS", 1.0)
    asking(LOOP)(world)


def taken_over(world: World) -> None:
    """As if a tokenizer had broken out of its library, and wrote the answers of its process."""
    signed()(world)
    ask = confined_tokenizer._Worker.ask

    def answer(worker: Any, facts: Mapping[str, Any], size: int) -> Any:
        said, content = ask(worker, facts, size)
        return {**said, "lengths": [-1]}, content

    world.patch.setattr(confined_tokenizer._Worker, "ask", answer)


def not_taken_over(world: World, step: str) -> Command | None:
    world.patch.undo()
    return ANOTHER(world, step)


CASES = (
    Case(
        "weights that are not finite in a bundle",
        LOADING,
        HOSTILE,
        "ask the party that it came from for it again",
        ANOTHER,
        signed(not_finite),
        "hold NaN or infinity",
    ),
    Case(
        "a config of a far larger model",
        LOADING,
        HOSTILE,
        "ask the party that it came from for it again",
        then(HOSTILE.replace("/hostile", "/declared")),
        declared,
        "larger than its tensors",
    ),
    Case(
        "a model that gives no numbers",
        "data_owner/sent_bundle.py",
        f"{TUNE.replace('/bundle', '/hostile')}{OUT}",
        "ask the model's owner for another bundle",
        then(TUNE + OUT),
        signed(lambda folder: edit_json(folder / "config.json", rms_norm_eps=1e-300)),
        "the bundle's model does not run",
    ),
    Case(
        "a template that needs all memory",
        "data/serve_tokenizer.py",
        HOSTILE,
        "ask the model's owner for another bundle",
        sound_template,
        asking("{{ 'a' * 10**12 }}"),
        "tokenizer or chat template fails",
        worker=True,
    ),
    Case(
        "a template without an end",
        WORKER,
        HOSTILE,
        "ask the model's owner for another bundle",
        sound_template,
        impatient,
        "is over its limits",
    ),
    Case(
        "a tokenizer that takes over its process",
        WORKER,
        HOSTILE,
        "ask the model's owner for another bundle",
        not_taken_over,
        taken_over,
        "gives no token ids",
    ),
)
