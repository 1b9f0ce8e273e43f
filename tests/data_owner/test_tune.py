import json
import os
import signal
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from offsite.config import EvalSpec, TuneSpec
from offsite.data_owner.tune import tune
from offsite.errors import DataError, IncompatibleError, OffsiteError, PolicyError, UsageError, VerificationError
from offsite.evaluation.evaluate import evaluate
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.models.torch_tensors import read_tensor
from offsite.protocol.contents import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RETURNED_WEIGHTS
from offsite.protocol.home import Home
from offsite.protocol.verify import verify_return
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_header
from offsite.training.run_log import last_record, log_file, run_folder
from offsite.training.schedule import step_count
from tiny import FAMILIES, tiny_base, tiny_bundle, tiny_parties, tiny_rows

CPU = torch.device("cpu")
METHODS = ("lora", "full")
TUNED = (*FAMILIES, "qwen2_moe")  # whose modules stack what comes back as single matrices


def spec_of(**settings):
    chosen = {"rank": 4, "lr": 5e-3, "max_steps": 6, "batch_size": 4, "compute": "fp32", "device": "cpu", "threads": 1}
    return TuneSpec(**(chosen | settings))


class House:
    """Both parties' homes, a bundle for each family, and rows."""

    def __init__(self, folder):
        self.parties = tiny_parties(folder)
        self.home = self.parties.data_owner
        self.rows = tiny_rows(folder / "rows.jsonl", 14)
        self.bundles = {
            family: tiny_bundle(
                tiny_base(folder / family, family, 5), folder / f"{family}-bundle", self.parties, keep=2
            )
            for family in TUNED
        }

    def tune(self, out, family="llama", *, resume=False, progress=None, eval_data=None, **settings):
        more = {} if progress is None else {"progress": progress}
        bundle = self.bundles[family]
        return tune(bundle, self.rows, out, spec_of(**settings), self.home, resume=resume, eval_data=eval_data, **more)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("house"))


def tensors_of(returned):
    name = ADAPTER_WEIGHTS if returned.manifest.method == "lora" else RETURNED_WEIGHTS
    return {name: read_tensor(tensor) for name, tensor in read_header(returned.folder / name).items()}


def losses_in(out):
    records = [json.loads(line) for line in log_file(out).read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "step"]


@pytest.mark.parametrize(
    ("method", "family"), [*((method, family) for method in METHODS for family in TUNED), ("bitfit", "gpt2")]
)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_return_is_what_the_owner_accepts(house, tmp_path, family, method, compute):
    out = tmp_path / "return"
    returned = house.tune(out, family, method=method, max_steps=12, compute=compute, schedule="constant")
    manifest = house.bundles[family].manifest
    verified = verify_return(out, house.parties.owner, manifest)
    assert verified == returned
    assert verified.manifest.recipient == manifest.issuer
    losses = losses_in(out)
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    assert not run_folder(out).exists()
    assert {path.name for path in out.parent.iterdir()} == {"return", "return.log.jsonl"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_return_is_an_ordinary_peft_folder(house, tmp_path, family):
    from peft import PeftModel

    returned = house.tune(tmp_path / "return", family)
    bundle = house.bundles[family]
    model = load_model(bundle.folder, dtype=torch.float32, device=CPU)
    with warnings.catch_warnings():  # missing or unexpected keys are warnings there
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        adapted = PeftModel.from_pretrained(model, str(returned.folder))
    held = tensors_of(returned)
    own = {
        name.replace(".default.weight", ".weight"): parameter
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    assert held.keys() == own.keys()
    assert all(torch.equal(held[name], own[name]) for name in held)
    family, trained = ARCHITECTURES[family], set(bundle.manifest.split.trained)
    targets = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in held}
    assert targets == {family.in_block(block, path) for block in trained for path in family.linears}
    assert all(bool(tensor.any()) for tensor in held.values())  # B starts at zero: everything has been trained


def test_bitfit_is_refused_where_there_are_no_biases(house, tmp_path):
    with pytest.raises(IncompatibleError, match="this llama model have none"):
        house.tune(tmp_path / "out", "llama", method="bitfit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_return_tells_nothing_about_the_data(house, tmp_path, method):
    out = tmp_path / "a-telling-name"
    house.tune(out, method=method)
    names = {ADAPTER_CONFIG, ADAPTER_WEIGHTS} if method == "lora" else {RETURNED_WEIGHTS}
    assert {path.name for path in out.iterdir()} == names | {"offsite.json", "offsite.json.sig"}
    manifest = json.loads((out / "offsite.json").read_text())
    assert set(manifest) == {
        "format", "requires", "files", "kind", "bundle", "signer", "recipient", "method", "lora", "bottleneck", "head",
            "earlier_checkpoints", "scores", "tensors", "classes",
    }  # fmt: skip
    assert (manifest["earlier_checkpoints"], manifest["scores"]) == (0, None)
    for path in out.iterdir():
        content = path.read_bytes()
        for secret in (b"telling", b"rows", b"loss", str(house.rows.parent).encode(), b"/tmp"):
            assert secret not in content
    if method == "lora":
        config = json.loads((out / ADAPTER_CONFIG).read_text())
        assert config["base_model_name_or_path"] is None
        assert set(config["target_modules"]) == set(house.bundles["llama"].manifest.lora_targets)


@pytest.mark.parametrize("family", TUNED)
def test_full_tuning_changes_every_permitted_tensor(house, tmp_path, family):
    held = tensors_of(house.tune(tmp_path / "return", family, method="full"))
    bundle = house.bundles[family]
    shipped = open_checkpoint(bundle.folder).tensors
    assert held.keys() == bundle.manifest.tensors.keys()
    for name, tensor in held.items():
        assert tensor.dtype is torch.float32
        before = read_tensor(shipped[name], torch.float32)
        assert not torch.equal(tensor, before), name
        assert (tensor - before).abs().max() < 0.2


@pytest.mark.parametrize("family", TUNED)
@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_is_bit_for_bit_the_same(house, tmp_path, family, method):
    class Stop:
        def __init__(self, *at):
            self.at = at

        def __call__(self, event):
            if event.stage == "tuning" and event.done in self.at:
                raise KeyboardInterrupt

    settings = {"family": family, "method": method, "max_steps": 9, "save_every": 2, "lora_dropout": 0.2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    house.tune(whole, **settings)
    for stop in (3, 8):  # in the first epoch and in the third
        with pytest.raises(KeyboardInterrupt):
            house.tune(parts, resume=stop > 3, progress=Stop(stop), **settings)
        assert not parts.exists()
    house.tune(parts, resume=True, **settings)
    name = RETURNED_WEIGHTS if method == "full" else ADAPTER_WEIGHTS
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert losses_in(whole) == losses_in(parts)


def test_a_crash_goes_back_to_the_last_resume_point(house, tmp_path):
    def crash(event):
        if event.stage == "tuning" and event.done == 5:
            raise RuntimeError("power cut")

    house.tune(tmp_path / "whole", save_every=2)
    with pytest.raises(RuntimeError):
        house.tune(tmp_path / "parts", save_every=2, progress=crash)
    files = {path.name for path in run_folder(tmp_path / "parts").iterdir()}
    assert files == {".lock", "run.json", "state.json", "state-4.safetensors"}
    house.tune(tmp_path / "parts", save_every=2, resume=True)
    assert (tmp_path / "whole" / ADAPTER_WEIGHTS).read_bytes() == (tmp_path / "parts" / ADAPTER_WEIGHTS).read_bytes()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_saves(house, tmp_path, sent):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    def press(event):
        if event.stage == "tuning" and event.done == 2:
            os.kill(os.getpid(), sent)

    with pytest.raises(KeyboardInterrupt):
        house.tune(tmp_path / "out", progress=press)
    state = json.loads((run_folder(tmp_path / "out") / "state.json").read_text())
    assert state["step"] == 3
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_is_there_is_continued_only_when_asked_and_only_if_it_is_the_same(house, tmp_path):
    def stop(event):
        if event.stage == "tuning" and event.done == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        house.tune(out, progress=stop)
    with pytest.raises(UsageError, match="--resume"):
        house.tune(out)
    with pytest.raises(UsageError, match="another one") as caught:
        house.tune(out, resume=True, lr=1e-4, rank=2)
    assert {reason.split(":")[0] for reason in caught.value.reasons} == {"lr", "rank"}
    house.rows.write_bytes(content := house.rows.read_bytes() + b"\n")
    try:
        with pytest.raises(UsageError, match="another one") as caught:
            house.tune(out, resume=True)
        assert [reason.split(":")[0] for reason in caught.value.reasons] == ["data"]
    finally:
        house.rows.write_bytes(content[:-1])
    house.tune(out, resume=True, save_every=3)  # how often to save is not what the run is


@pytest.mark.parametrize("step", [4, 6])  # in the middle and after the last
def test_a_validation_that_an_interruption_cut_off_is_made_after_it(house, tmp_path, step):
    def stop(event):
        if event.stage == f"validating step {step}":
            raise KeyboardInterrupt

    out, settings = tmp_path / "out", {"eval_data": house.rows, "eval_every": 4}
    with pytest.raises(KeyboardInterrupt):
        house.tune(out, progress=stop, **settings)
    house.tune(out, resume=True, **settings)
    records = [json.loads(line) for line in log_file(out).read_text().splitlines()]
    assert {record["step"] for record in records if record["event"] == "validation"} == {0, 4, 6}


def test_the_log_says_first_what_the_kernels_replaced(house, tmp_path):
    stages = []
    house.tune(tmp_path / "out", max_steps=1, lanes=2, progress=lambda event: stages.append(event.stage))
    first, *others = map(json.loads, log_file(tmp_path / "out").read_text().splitlines())
    assert (first["event"], first["backend"]) == ("kernels", "cpu")
    assert "kernels" not in {record["event"] for record in others}
    counts = {piece["name"]: piece["count"] for piece in first["pieces"]}
    assert counts["micro-batches side by side"] == 2
    assert counts["LoRA layers"] > 0
    assert all(piece["reason"] for piece in first["pieces"])
    (line,) = (stage for stage in stages if stage.startswith("kernels: cpu"))
    assert "compiled kernels (" in line


def test_passes_are_counted_as_they_were_meant():
    assert [step_count(TuneSpec(epochs=epochs, batch_size=1), 100) for epochs in (0.07, 0.071, 1.1)] == [7, 8, 110]


def test_a_run_that_is_still_at_work_is_left_alone(house, tmp_path):
    out, refused = tmp_path / "out", []

    def meanwhile(event):
        if event.stage == "tuning" and event.done in (1, 3):
            with pytest.raises(UsageError, match="another tuning is at work") as caught:
                house.tune(out, save_every=2, resume=True)
            refused.append(caught.value)

    house.tune(out, save_every=2, progress=meanwhile)
    assert len(refused) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.log.jsonl"}


def test_resume_without_a_run_starts_one(house, tmp_path):
    assert house.tune(tmp_path / "out", resume=True, max_steps=1).folder.exists()


def test_a_damaged_resume_point_is_named(house, tmp_path):
    def stop(event):
        if event.stage == "tuning" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        house.tune(tmp_path / "out", progress=stop)
    state = run_folder(tmp_path / "out") / "state-1.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(OffsiteError, match="state-1"):
        house.tune(tmp_path / "out", resume=True)


def test_what_the_owner_would_refuse_is_refused_before_any_work(house, tmp_path):
    bundle = tiny_bundle(
        house.bundles["llama"].folder, tmp_path / "strict", house.parties, methods=("full",), max_rank=2
    )
    with pytest.raises(PolicyError) as caught:
        tune(bundle, tmp_path / "no-such-data", tmp_path / "out", spec_of(), house.home)
    assert caught.value.reasons == ("method lora, the bundle permits full", "rank 4, the bundle permits up to 2")


def test_a_bundle_of_another_home_is_not_tuned(house, tmp_path):
    stranger = Home(tmp_path / "stranger")
    stranger.create_identity("stranger")
    with pytest.raises(UsageError, match="is addressed to SHA256:") as caught:
        tune(house.bundles["llama"], house.rows, tmp_path / "out", spec_of(), stranger)
    assert stranger.identity().public_key.fingerprint in caught.value.reasons[0]
    assert {path.name for path in tmp_path.iterdir()} == {"stranger"}


def test_a_changed_bundle_is_not_tuned(house, tmp_path):
    bundle = tiny_bundle(house.bundles["llama"].folder, tmp_path / "bundle", house.parties)
    weights = bundle.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(VerificationError):
        tune(bundle, house.rows, tmp_path / "out", spec_of(), house.home)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_something_is_left_alone(house, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="not an empty folder"):
        house.tune(tmp_path)


def test_the_return_may_be_the_empty_folder_one_stands_in(house, tmp_path, monkeypatch):
    (tmp_path / "return").mkdir()
    monkeypatch.chdir(tmp_path / "return")
    returned = house.tune(Path(), max_steps=1)
    assert verify_return(returned.folder, house.parties.owner, house.bundles["llama"].manifest) == returned
    assert {path.name for path in tmp_path.iterdir()} == {"return", "return.log.jsonl"}


def test_bad_rows_leave_nothing_behind(house, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError):
        tune(house.bundles["llama"], tmp_path / "bad.jsonl", tmp_path / "out", spec_of(), house.home)
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jsonl"}


def test_rows_that_are_left_out_are_told(house, tmp_path):
    rows = [{"prompt": "a", "completion": "b" * length} for length in (3, 90, 90, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = []
    spec = spec_of(max_steps=1, long_rows="skip")
    bundle = house.bundles["llama"]
    tune(bundle, tmp_path / "rows.jsonl", tmp_path / "out", spec, house.home, progress=events.append)
    (told,) = (event for event in events if "left out" in event.stage)
    assert "rows.jsonl" in told.stage
    assert (told.done, told.total) == (2, 4)
    start = last_record(log_file(tmp_path / "out"), "start")
    assert start is not None
    assert start["rows"] == 2


def test_a_tokenizer_that_does_not_fit_the_model_is_refused_before_any_work(house, tmp_path):
    base = tiny_base(tmp_path / "base", blocks=3, vocab_size=270)
    bundle = tiny_bundle(base, tmp_path / "bundle", house.parties)
    with pytest.raises(IncompatibleError, match="does not know"):
        tune(bundle, house.rows, tmp_path / "out", spec_of(), house.home)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "bundle"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_training_that_diverges_is_an_error(house, tmp_path):
    with pytest.raises(OffsiteError, match=r"diverged|NaN") as caught:
        house.tune(tmp_path / "out", method="full", lr=1e30, warmup=0, max_steps=4)
    assert "--lr" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert house.tune(tmp_path / "out", method="full", lr=1e-4, max_steps=1).folder.exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_validation_is_what_evaluation_measures(house, tmp_path, method, compute):
    events = []
    out = tmp_path / "out"
    house.tune(out, method=method, compute=compute, eval_data=house.rows, eval_every=4, progress=events.append)
    records = [json.loads(line) for line in log_file(out).read_text().splitlines()]
    found = {record["step"]: record["loss"] for record in records if record["event"] == "validation"}
    assert found.keys() == {0, 4, 6}
    spec = EvalSpec(compute=compute, device="cpu", threads=1)
    scored = evaluate(house.bundles["llama"].folder, house.rows, spec, adapter=out).loss
    # tuning runs norms and MLPs as single functions, which round at other places in bf16
    assert scored == pytest.approx(found[6], rel={"fp32": 1e-5, "bf16": 1e-3}[compute])
    tuning = [event for event in events if event.stage == "tuning"]
    assert [(event.done, event.total) for event in tuning] == [(step, 6) for step in range(1, 7)]
    assert set(tuning[0].facts) == {"loss", "lr", "tokens/s", "left"}


def test_the_loss_of_a_step_does_not_depend_on_its_micro_batches(house, tmp_path):
    together, apart = tmp_path / "together", tmp_path / "apart"
    a = tensors_of(house.tune(together, max_steps=3, method="full"))
    b = tensors_of(house.tune(apart, max_steps=3, method="full", micro_batch_tokens=16))
    assert losses_in(together) == pytest.approx(losses_in(apart), rel=1e-4)
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)


def test_dropout_runs_in_trained_blocks_and_nowhere_else(house, tmp_path, monkeypatch):
    from torch.nn import functional as F

    from offsite.data_owner.text_task import TextTask

    running = []
    dropout = F.dropout
    monkeypatch.setattr(
        F,
        "dropout",
        lambda x, p=0.5, training=True, inplace=False: running.append(training) or dropout(x, p, training, inplace),
    )
    seen = {"training": set()}
    loss = TextTask.loss

    def watched(task, *rest):
        seen["training"] |= {name for name, module in task.network.body.named_modules() if module.training}
        return loss(task, *rest)

    monkeypatch.setattr(TextTask, "loss", watched)
    house.tune(tmp_path / "out", "gpt2", method="full", max_steps=1)
    blocks = {name.split(".")[1] for name in seen["training"] if name.startswith("h.")}
    assert blocks == {"0", "3"}  # of 0 1 2 3
    assert "drop" not in seen["training"]
    assert any(running)
    assert not all(running)


def test_epochs_are_counted_in_steps(house, tmp_path):
    house.tune(tmp_path / "out", max_steps=None, epochs=1.5, batch_size=5)
    assert len(losses_in(tmp_path / "out")) == 5  # 14 rows: 3 steps an epoch, 4.5 rounded up


def test_the_learning_rate_warms_up_and_falls():
    from offsite.training.schedule import learning_rate

    for schedule, last in (("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)):
        rates = [learning_rate(step, 50, peak=1.0, warmup=0.2, schedule=schedule) for step in range(50)]
        assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert all(after <= before for before, after in pairwise(rates[9:]))
        assert rates[-1] == pytest.approx(last, abs=0.05)


def test_norms_and_biases_do_not_decay(house, tmp_path):
    """A resume point says what the optimiser does to each weight."""

    def stop(event):
        if event.stage == "tuning":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        house.tune(tmp_path / "out", "gpt2", method="full", weight_decay=0.5, progress=stop)
    groups = json.loads((run_folder(tmp_path / "out") / "state.json").read_text())["groups"]
    decay = {group["weight_decay"]: set(group["params"]) for group in groups}
    assert all(name.endswith((".bias", "ln_1.weight", "ln_2.weight")) for name in decay[0.0])
    assert all(name.endswith(".weight") and "ln_" not in name for name in decay[0.5])
    assert decay[0.0] | decay[0.5] == house.bundles["gpt2"].manifest.tensors.keys()


def test_a_bundle_that_keeps_every_block_tunes_as_the_base_would(tmp_path):
    """LoRA as trained here, against PEFT and torch alone on the same rows."""
    from offsite.data.batches import collate
    from offsite.data.read_rows import read_rows
    from offsite.data.tokens import encode
    from offsite.data_owner.methods.lora import attach
    from offsite.models.tokenizers import load_tokenizer

    parties = tiny_parties(tmp_path)
    bundle = tiny_bundle(tiny_base(tmp_path / "b", blocks=3), tmp_path / "bundle", parties)
    rows = tiny_rows(tmp_path / "rows.jsonl", 4)
    spec = spec_of(max_steps=1, warmup=0.0, batch_size=4, max_grad_norm=1e9, schedule="constant")
    returned = tensors_of(tune(bundle, rows, tmp_path / "out", spec, parties.data_owner))

    model = load_model(bundle.folder, dtype=torch.float32, device=CPU)
    torch.manual_seed(spec.seed)
    weights = attach(model, bundle.manifest, spec)
    examples = encode(read_rows(rows), load_tokenizer(bundle.folder), source=rows, max_length=64).examples
    batch = collate(examples)
    labels = torch.full(batch.ids.shape, -100).flatten()
    labels[torch.from_numpy(batch.places)] = torch.from_numpy(batch.targets)
    logits = model(torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()
    torch.optim.AdamW(weights.values(), lr=spec.peak_lr, weight_decay=0.0).step()
    for name, tensor in returned.items():
        torch.testing.assert_close(tensor, weights[name].detach(), rtol=1e-4, atol=1e-4)
