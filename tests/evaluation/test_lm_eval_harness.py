"""Against lm-evaluation-harness itself where it is installed (the extra `lm-eval`; too large for the dev one)."""

import fnmatch
import importlib.util
import json
from types import SimpleNamespace

import pytest

from artifacts import full_return, lora_return
from offsite import extras
from offsite.config import EvalSpec
from offsite.errors import UsageError
from offsite.evaluation import lm_eval_harness as stage
from offsite.evaluation.evaluate import evaluate
from offsite.evaluation.lm_eval_harness import TaskScore, harness_results, run_tasks
from tiny import TEXT, tiny_base, tiny_bundle, tiny_parties

SPEC = EvalSpec(device="cpu", compute="fp32", threads=1)
INSTALLED = importlib.util.find_spec("lm_eval") is not None
harness = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")
ignored = pytest.mark.filterwarnings("ignore")  # of the harness and what it brings
WORDS = [*" ".join(TEXT).lower().split()[:16], "ö"]  # 17

TASK = r"""
task: ours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def questions(count=24):
    """Questions with two to four choices of very different lengths."""
    made = []
    for i in range(count):
        choices = [
            " ".join(WORDS[(i * 5 + j * 3 + k) % 17] for k in range(1 + (i + j * 2) % 5)) for j in range(2 + i % 3)
        ]
        made.append({"question": f"{WORDS[i % 17]} {i}?", "choices": choices, "answer": i % len(choices)})
    return made


@pytest.fixture
def items(tmp_path):
    """Rows, and a folder with a task that reads them."""
    rows = tmp_path / "mc.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions()))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(TASK.format(rows=rows, cache=tmp_path / "cache"))
    return rows, tmp_path / "tasks"


def subject(folder, kind, family, **settings):
    """A model folder, and what was tuned on it."""
    base = tiny_base(folder / "base", family, 4, max_position_embeddings=128, **settings)
    if kind == "base":
        return base, None
    parties = tiny_parties(folder)
    bundle = tiny_bundle(base, folder / "bundle", parties, keep=1)
    if kind == "bundle":
        return bundle.folder, None
    out, home = folder / "return", parties.data_owner
    if kind == "lora":
        return bundle.folder, lora_return(bundle, out, home).folder
    return bundle.folder, full_return(bundle, out, home, lambda name, shipped: shipped * 1.2).folder


@harness
@ignored
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("base", {}),
        ("base", {"adds_bos": False}),
        ("base", {"bos": False}),
        ("base", {"pad": "eos"}),
        ("bundle", {}),
        ("lora", {}),
        ("full", {"adds_bos": False}),
    ],
)
def test_item_by_item_our_scores_are_those_of_the_harness(tmp_path, items, family, kind, settings):
    rows, tasks = items
    model, adapter = subject(tmp_path, kind, family, **settings)
    ours = evaluate(model, rows, SPEC, adapter=adapter)
    theirs = harness_results(model, ["ours"], SPEC, adapter=adapter, tasks_path=tasks)
    samples = sorted(theirs["samples"]["ours"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ours.choice_scores) == 24
    for mine, sample in zip(ours.choice_scores, samples, strict=True):
        found = [float(response[0]) for response in sample["filtered_resps"]]
        assert mine.log_likelihoods == pytest.approx(found, abs=1e-4)
        assert (float(mine.right), float(mine.right_by_length)) == (sample["acc"], sample["acc_norm"])
    assert theirs["results"]["ours"]["acc,none"] == pytest.approx(ours.accuracy)
    assert theirs["results"]["ours"]["acc_norm,none"] == pytest.approx(ours.accuracy_norm)
    assert 0 < ours.accuracy < 1
    assert ours.accuracy != ours.accuracy_norm or kind != "base"


@harness
@ignored
def test_tasks_on_the_command_line(tmp_path, items, capsys):
    from offsite.cli import main

    rows, tasks = items
    model, adapter = subject(tmp_path, "lora", "llama")
    settings = tmp_path / "settings.toml"
    settings.write_text('[eval]\nmax_rows = 10\ncompute = "fp32"\ndevice = "cpu"\nthreads = 1\n')
    words = ["eval", model, "--adapter", adapter, "--tasks", "ours", "--tasks-path", tasks, "--data", rows]
    assert main([str(word) for word in [*words, "--config", settings, "--json"]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tasks"]["ours"]["rows"] == 10
    assert result["tasks"]["ours"]["acc"] == pytest.approx(result["accuracy"])
    assert result["tasks"]["ours"]["acc_norm"] == pytest.approx(result["accuracy_norm"])


@harness
@ignored
def test_tasks_that_do_not_run(tmp_path, items):
    base = tiny_base(tmp_path / "base")
    with pytest.raises(UsageError, match="no such task: nothing, nowhere"):
        run_tasks(base, ["ours", "nothing", "nowhere"], SPEC, tasks_path=items[1])
    with pytest.raises(UsageError, match="there is no folder"):
        run_tasks(base, ["ours"], SPEC, tasks_path=tmp_path / "none")
    items[0].unlink()
    with pytest.raises(UsageError, match="could not run ours"):
        run_tasks(base, ["ours"], SPEC, tasks_path=items[1])


def test_without_the_harness_the_error_names_the_extra(tmp_path, monkeypatch):
    def missing(module):
        if module.startswith("offsite."):
            return __import__(module, fromlist=["_"])
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(UsageError) as caught:
        run_tasks(tmp_path, ["arc_easy"], SPEC)
    assert "lm_eval" in caught.value.reasons[0]
    assert "[lm-eval]" in str(caught.value.next_step)


class Fake:
    """What of the harness is used; what it was given is kept."""

    def __init__(self):
        self.given = {}
        self.modules = {
            "lm_eval": SimpleNamespace(simple_evaluate=self.evaluate),
            "lm_eval.models.huggingface": SimpleNamespace(HFLM=self.language_model),
            "lm_eval.tasks": SimpleNamespace(TaskManager=lambda include_path: self),
            "yaml": SimpleNamespace(YAMLError=ZeroDivisionError),
            "datasets.exceptions": SimpleNamespace(DatasetsError=AssertionError),
        }

    def language_model(self, **given):
        self.given["model"] = given

    def match_tasks(self, names):
        return [task for task in ("a1", "a2", "b") if any(fnmatch.fnmatch(task, name) for name in names)]

    def evaluate(self, **given):
        self.given["evaluate"] = given
        found = {"name": "a1", "alias": "a1", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.1}
        return {
            "results": {"a1": {**found, "exact_match,strict": 0.25, "f1_stderr,none": "N/A"}},
            "n-samples": {"a1": {"original": 9, "effective": 7}},
        }


@pytest.fixture
def fake(monkeypatch):
    made = Fake()
    monkeypatch.setattr(stage, "require", lambda module, extra, purpose: made.modules[module])
    return made


def test_the_model_is_handed_over_as_it_is_scored(tmp_path, fake):
    base = tiny_base(tmp_path / "base", blocks=2, adds_bos=False)
    scores = run_tasks(base, ["a*"], SPEC.changed({"max_rows": 7, "micro_batch_tokens": 640}))
    assert scores == [TaskScore("a1", 7, {"acc": 0.5, "acc_stderr": 0.1, "exact_match,strict": 0.25})]
    model, task = fake.given["model"], fake.given["evaluate"]
    assert (model["max_length"], model["batch_size"], model["add_bos_token"]) == (64, 10, True)
    assert (task["tasks"], task["limit"]) == (["a1", "a2"], 7)
    tokenizer = model["tokenizer"]
    ids = tokenizer("The fox", add_special_tokens=True)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *tokenizer("The fox", add_special_tokens=False)["input_ids"]]


def test_a_tokenizer_without_a_beginning_token_stays_so(tmp_path, fake):
    run_tasks(tiny_base(tmp_path / "base", blocks=2, bos=False), ["b"], SPEC)
    tokenizer = fake.given["model"]["tokenizer"]
    assert fake.given["model"]["add_bos_token"] is False
    assert tokenizer.decode(tokenizer("The fox")["input_ids"]) == "The fox"


def test_every_unknown_task_is_named_before_a_model_is_loaded(tmp_path, fake):
    with pytest.raises(UsageError, match="no such task: c, d"):
        run_tasks(tmp_path / "nothing", ["b", "c", "d"], SPEC)
    with pytest.raises(UsageError, match="there is no folder"):
        run_tasks(tmp_path / "nothing", ["b"], SPEC, tasks_path=tmp_path / "none")


@pytest.mark.parametrize("error", [ZeroDivisionError("bad yaml"), AssertionError("no rows"), KeyError("field")])
def test_what_the_harness_raises_is_told(tmp_path, fake, error):
    def fails(**_):
        raise error

    fake.modules["lm_eval"].simple_evaluate = fails
    with pytest.raises(UsageError, match="could not run b") as caught:
        run_tasks(tiny_base(tmp_path / "base", blocks=2), ["b"], SPEC)
    assert type(error).__name__ in caught.value.reasons[0]
