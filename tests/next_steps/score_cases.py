"""Steps of errors of `offsite eval`: models, adapters, pictures and tasks that do not go together."""

import json
import shutil

from artifacts import edit_weights, full_return
from evaluation.test_lm_eval_harness import Fake
from next_steps.picture_cases import EVAL as EVAL_PICTURES
from next_steps.picture_cases import PROBE, and_pictures
from next_steps.world import EVAL, OUT, PACK, PLUG, Case, Command, Spoil, World, as_advised, then
from offsite.cli import main
from offsite.config import EvalSpec
from offsite.evaluation import lm_eval_harness
from offsite.evaluation.compare import Contestant, compare
from offsite.evaluation.image_scores import evaluate_images
from offsite.evaluation.row_scores import read_row_scores
from offsite.models.image_encoder import Encoder
from offsite.protocol.contents import CLASSIFIER
from offsite.protocol.verify import verify_bundle
from tiny import tiny_base, tiny_vision_base

SCORES, LINEAGE, HARNESS = "evaluation/image_scores.py", "evaluation/lineage.py", "evaluation/lm_eval_harness.py"
TASKS = "eval {folder}/base --tasks b"
PICTURED = "compare {folder}/encoder --data {folder}/pictures --probe {folder}/pictures"
ON_BUNDLE = "eval {folder}/encoder-bundle --data {folder}/pictures --home {tuner}"
CLASSIFIED = f"{ON_BUNDLE} --adapter {{folder}}/encoder-return"
EXACT = EvalSpec(compute="fp32", device="cpu", threads=1, workers=0)


def plugged(form: str) -> Spoil:
    def make(world: World) -> None:
        assert main(world.words(f"{PLUG} --as {form} --out {{folder}}/plugged")) == 0

    return make


def other_base(world: World) -> None:
    plugged("adapter")(world)
    tiny_base(world.folder / "other", blocks=3, seed=1)


def scored_alone(world: World, step: str) -> str:
    return as_advised(world, step).replace("{tuner}", "{owner}")


def classifier(world: World) -> None:
    """The owner's own, and pictures of its classes."""
    tiny_vision_base(world.folder / "classifier", "vit", 2, classifier=True)
    shutil.copytree(world.folder / "pictures" / "red", world.folder / "own" / "SECRET-one")
    shutil.copytree(world.folder / "pictures" / "blue", world.folder / "own" / "SECRET-two")


def by_return(name: str) -> Command:
    """Score pictures on the encoder's bundle with a return that was not verified."""
    return lambda world: evaluate_images(
        world.folder / "encoder-bundle", world.folder / "pictures", EXACT, adapter=world.folder / name
    )


def text_return(world: World) -> None:
    bundle = verify_bundle(world.folder / "bundle", world.parties.data_owner)
    full_return(bundle, world.folder / "text-return", world.parties.data_owner)


def half_a_classifier(world: World) -> None:
    shutil.copytree(world.folder / "encoder-return", world.folder / "other-return")

    def halved(arrays: dict) -> None:  # type: ignore[type-arg]
        arrays["classifier.weight"] = arrays["classifier.weight"][:, :16].copy()

    edit_weights(world.folder / "other-return" / CLASSIFIER, halved)


def one_class(world: World) -> None:
    shutil.copytree(world.folder / "pictures" / "red", world.folder / "one" / "red")


def other_features(world: World) -> None:
    """As of a type of model whose features are not those that the table of families says."""
    world.patch.setattr(Encoder, "inputs", property(lambda encoder: 7))


def harness(**changes: object) -> Spoil:
    """As if lm-evaluation-harness was installed, with the tasks a1, a2 and b."""

    def make(world: World) -> None:
        fake = Fake()
        vars(fake.modules["lm_eval"]).update(changes)
        world.patch.setattr(lm_eval_harness, "require", lambda module, extra, purpose: fake.modules[module])

    return make


def no_rows(**_: object) -> None:
    raise AssertionError("no rows")  # what stands for an error of the library `datasets` in Fake


def with_rows(world: World, step: str) -> None:
    harness()(world)


def read_scores(world: World) -> object:
    return read_row_scores(world.folder / "scores.jsonl")


def scored_again(world: World, step: str) -> None:
    assert main(world.words(f"{EVAL} --row-scores {{folder}}/scores.jsonl")) == 0


def compared(*names: str) -> Command:
    """Compare models by the function."""

    def run(world: World) -> None:
        models = [Contestant(name, world.folder / name, None) for name in names]
        compare(models, world.folder / "rows.jsonl", EXACT)

    return run


def shorter_context(world: World) -> None:
    """A model that leaves out a row that another one does not."""
    tiny_base(world.folder / "short", blocks=1, max_position_embeddings=24)
    lines = [json.dumps({"prompt": "a", "completion": "b " * count}) for count in (3, 4, 30)]
    (world.folder / "rows.jsonl").write_text("\n".join(lines))
    (world.folder / "s.toml").write_text('[eval]\nlong_rows = "skip"\n')


def short_rows(world: World, step: str) -> None:
    (world.folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)


COMPARE = "evaluation/compare.py"
COMPARED = "compare {folder}/base {folder}/base --data {folder}/rows.jsonl"
INSPECTED = then("inspect {folder}/plugged --for vllm --home {owner}")
CASES = (
    Case(
        "a plug-in for another server",
        "cli/inspect_verbs.py",
        "inspect {folder}/plugged --for other --home {owner}",
        "write `offsite inspect PATH --for vllm`",
        INSPECTED,
        plugged("adapter"),
    ),
    Case(
        "a bundle for a server",
        "cli/inspect_verbs.py",
        "inspect {folder}/bundle --for vllm --home {owner}",
        "name the plug-in's folder",
        INSPECTED,
        plugged("adapter"),
    ),
    Case(
        "a comparison with a probe",
        "cli/compare_verb.py",
        f"{COMPARED} --probe {{folder}}",
        "leave --probe out",
        then(COMPARED),
    ),
    Case(
        "a comparison of one model by the function",
        COMPARE,
        compared("base"),
        "name at least two models",
        lambda world, step: compared("base", "base"),
    ),
    Case(
        "a comparison of words and pictures",
        COMPARE,
        "compare {folder}/base {folder}/encoder --data {folder}/rows.jsonl",
        "name models of one kind",
        then(COMPARED),
        and_pictures(),
    ),
    Case(
        "an adapter of words among encoders",
        COMPARE,
        f"{PICTURED} --home {{tuner}}".replace("/encoder ", "/encoder {folder}/plugged "),
        "name a return behind its bundle",
        then(
            f"{PICTURED} --home {{tuner}}".replace(
                "/encoder ", "/encoder-bundle {folder}/encoder-return {folder}/encoder "
            )
        ),
        and_pictures(plugged("adapter")),
    ),
    Case(
        "models that leave out different rows",
        COMPARE,
        f"{COMPARED.replace('/base --data', '/short --data')} --config {{folder}}/s.toml",
        "leave out rows that are too long",
        short_rows,
        shorter_context,
    ),
    Case(
        "a check of tasks",
        "cli/eval_verb.py",
        f"{TASKS} --check",
        "give rows with --data",
        then(f"{EVAL} --check"),
        what="--check is about rows",
    ),
    Case(
        "a plug-in on another base",
        "cli/verified_models.py",
        f"{EVAL.replace('/base', '/other')} --adapter {{folder}}/plugged --home {{owner}}",
        "name the base that `offsite plug-in` was given",
        then(f"{EVAL} --adapter {{folder}}/plugged --home {{owner}}"),
        other_base,
    ),
    Case(
        "a merged plug-in as an adapter",
        LINEAGE,
        f"{EVAL} --adapter {{folder}}/plugged --home {{owner}}",
        "score it alone: `offsite eval",
        scored_alone,
        plugged("merged"),
    ),
    Case(
        "a plug-in on the bundle",
        LINEAGE,
        "eval {folder}/bundle --data {folder}/rows.jsonl --adapter {folder}/plugged --home {tuner}",
        "name the base's folder as the model",
        then(f"{EVAL} --adapter {{folder}}/plugged --home {{tuner}}"),
        plugged("adapter"),
    ),
    Case(
        "an adapter of texts on pictures",
        SCORES,
        f"{EVAL_PICTURES} --adapter {{folder}}/plugged --home {{tuner}}",
        "name a return as the adapter",
        then(CLASSIFIED),
        and_pictures(plugged("adapter")),
    ),
    Case(
        "a return and a probe",
        SCORES,
        f"{CLASSIFIED} --probe {{folder}}/pictures",
        "give one of --adapter and --probe",
        then(CLASSIFIED),
        and_pictures(),
    ),
    Case(
        "a probe of a classifier",
        SCORES,
        "eval {folder}/classifier --data {folder}/own --probe {folder}/own",
        "leave --adapter and --probe out",
        then("eval {folder}/classifier --data {folder}/own"),
        and_pictures(classifier),
    ),
    Case(
        "classes that a classifier does not know",
        SCORES,
        "eval {folder}/classifier --data {folder}/pictures",
        "of the classes that it was tuned on",
        then("eval {folder}/classifier --data {folder}/own"),
        and_pictures(classifier),
    ),
    Case(
        "a return without a classifier",
        SCORES,
        by_return("text-return"),
        "name a return that was tuned on pictures",
        lambda world, step: by_return("encoder-return"),
        and_pictures(text_return),
    ),
    Case(
        "a classifier of another width",
        SCORES,
        by_return("other-return"),
        "name the bundle that it was tuned on",
        lambda world, step: by_return("encoder-return"),
        and_pictures(half_a_classifier),
        what="does not fit the encoder",
    ),
    Case(
        "a probe of one class",
        SCORES,
        PROBE.replace("--probe {folder}/pictures", "--probe {folder}/one"),
        "name other pictures with --probe",
        then(PROBE),
        and_pictures(one_class),
    ),
    Case(
        "features that the table does not know",
        "evaluation/first_row.py",
        f"{PACK.replace('/base', '/encoder')}{OUT}",
        "choose a model of another type",
        then(PACK + OUT),
        and_pictures(other_features),
    ),
    Case(
        "no folder of tasks",
        HARNESS,
        f"{TASKS} --tasks-path {{folder}}/tasks",
        "name the folder of your task files",
        lambda world, step: (world.folder / "tasks").mkdir(),
        harness(),
    ),
    Case(
        "no such task",
        HARNESS,
        TASKS.replace("--tasks b", "--tasks c"),
        "lists its own; --tasks-path DIR adds yours",
        then(TASKS),
        harness(),
    ),
    Case(
        "a task without rows",
        HARNESS,
        TASKS,
        "check the task's file, and that its rows are on this machine",
        with_rows,
        harness(simple_evaluate=no_rows),
    ),
    Case(
        "damaged scores of rows",
        "evaluation/row_scores.py",
        read_scores,
        "score the model again",
        scored_again,
        lambda world: (world.folder / "scores.jsonl").write_text("{"),
    ),
)
