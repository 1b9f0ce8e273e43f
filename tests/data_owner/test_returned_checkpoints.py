"""Checkpoints of a run: each is what a shorter run returns, and an interruption changes none of them."""

import json
import shutil

import pytest

from data_owner.test_tune import House, spec_of
from offsite.config import EvalSpec, TuneSpec
from offsite.data_owner.tune import tune
from offsite.errors import StorageError, UsageError
from offsite.evaluation.evaluate import evaluate
from offsite.protocol.contents import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS_OF
from offsite.protocol.verify import verify_return
from offsite.training.run_log import log_file, run_folder
from offsite.training.schedule import checkpoint_steps

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("house"))


def stop_after(step):
    def stop(event):
        if event.stage == "tuning" and event.done == step:
            raise KeyboardInterrupt

    return stop


def test_steps_are_evenly_spaced_and_end_with_the_last():
    for wanted, steps, expected in ((1, 7, (7,)), (3, 7, (3, 5, 7)), (3, 3, (1, 2, 3)), (4, 100, (25, 50, 75, 100))):
        assert checkpoint_steps(TuneSpec(checkpoints=wanted), steps) == expected
    with pytest.raises(UsageError, match="4 checkpoints were asked for, but the run has 3 steps"):
        checkpoint_steps(TuneSpec(checkpoints=4), 3)


@pytest.mark.parametrize(
    ("method", "family"), [("lora", "llama"), ("full", "qwen2_moe"), ("bitfit", "gpt2"), ("bottleneck", "llama")]
)
def test_each_checkpoint_is_the_return_of_a_shorter_run(house, tmp_path, method, family):
    settings = {"family": family, "method": method, "schedule": "constant", "warmup": 0}
    returned = house.tune(tmp_path / "return", max_steps=3, checkpoints=3, **settings)
    assert returned.manifest.earlier_checkpoints == 2
    assert verify_return(returned.folder, house.parties.owner, house.bundles[family].manifest) == returned
    for steps, file in ((1, "checkpoint-1.safetensors"), (2, "checkpoint-2.safetensors"), (3, WEIGHTS_OF[method])):
        shorter = house.tune(tmp_path / f"{steps}", max_steps=steps, **settings)
        assert (returned.folder / file).read_bytes() == (shorter.folder / WEIGHTS_OF[method]).read_bytes()
    assert not run_folder(returned.folder).exists()


def test_interrupted_and_resumed_keeps_what_was_taken(house, tmp_path):
    settings = {"max_steps": 9, "checkpoints": 4, "save_every": 2, "report_scores": True, "eval_data": house.rows}
    whole = house.tune(tmp_path / "whole", **settings)
    for stop in (3, 6, 8):  # with a checkpoint after steps 3, 5, 7 and 9
        with pytest.raises(KeyboardInterrupt):
            house.tune(tmp_path / "parts", resume=stop > 3, progress=stop_after(stop), **settings)
    parts = house.tune(tmp_path / "parts", resume=True, **settings)
    assert parts.manifest.scores == whole.manifest.scores
    assert parts.manifest.files == whole.manifest.files


def test_a_score_that_an_interruption_cut_off_is_measured_after_it(house, tmp_path):
    settings = {"max_steps": 4, "checkpoints": 2, "report_scores": True, "eval_data": house.rows}
    whole = house.tune(tmp_path / "whole", **settings)

    def stop(event):
        if event.stage == "validating step 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        house.tune(tmp_path / "parts", progress=stop, **settings)
    assert not (run_folder(tmp_path / "parts") / "scores.json").exists()
    assert (run_folder(tmp_path / "parts") / "state-2.safetensors").exists()
    parts = house.tune(tmp_path / "parts", resume=True, **settings)
    assert parts.manifest.scores == whole.manifest.scores


def test_a_stop_while_a_checkpoint_is_written_does_not_count_its_step(house, tmp_path, monkeypatch):
    from offsite.data_owner import returned_checkpoints

    write = returned_checkpoints.write_safetensors

    def cut(file, tensors):
        write(file, tensors)
        file.write_bytes(file.read_bytes()[:40])
        raise KeyboardInterrupt

    settings = {"max_steps": 4, "checkpoints": 2, "save_every": 1}
    whole = house.tune(tmp_path / "whole", **settings)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(returned_checkpoints, "write_safetensors", cut)
        house.tune(tmp_path / "parts", **settings)
    assert json.loads((run_folder(tmp_path / "parts") / "state.json").read_text())["step"] == 1
    assert house.tune(tmp_path / "parts", resume=True, **settings).manifest.files == whole.manifest.files


def test_a_checkpoint_that_is_gone_is_named(house, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        house.tune(tmp_path / "out", max_steps=6, checkpoints=3, progress=stop_after(5))
    (run_folder(tmp_path / "out") / "checkpoint-1.safetensors").unlink()
    with pytest.raises(StorageError, match="has lost checkpoints") as caught:
        house.tune(tmp_path / "out", max_steps=6, checkpoints=3, resume=True)
    assert caught.value.reasons == ("checkpoint-1.safetensors is missing",)


@pytest.mark.parametrize(("compute", "rounding"), [("fp32", 1e-5), ("bf16", 3e-4)])
def test_scores_are_what_evaluation_measures(house, tmp_path, compute, rounding):
    settings = {"max_steps": 4, "checkpoints": 2, "compute": compute, "eval_data": house.rows}
    silent = house.tune(tmp_path / "silent", **settings)
    assert silent.manifest.scores is None
    returned = house.tune(tmp_path / "return", report_scores=True, **settings)
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    shutil.copy(returned.folder / "checkpoint-1.safetensors", earlier / ADAPTER_WEIGHTS)
    shutil.copy(returned.folder / ADAPTER_CONFIG, earlier / ADAPTER_CONFIG)
    spec = EvalSpec(compute=compute, device="cpu", threads=1)
    bundle = house.bundles["llama"].folder
    measured = [evaluate(bundle, house.rows, spec, adapter=folder).loss for folder in (earlier, returned.folder)]
    assert returned.manifest.scores == pytest.approx(measured, rel=rounding)
    assert measured[1] < measured[0] * (1 - 10 * rounding)
    records = [json.loads(line) for line in log_file(tmp_path / "silent").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "validation"] == [0, 2, 4]


def test_what_cannot_be_returned_is_refused_before_any_work(house, tmp_path):
    bundle, out = house.bundles["llama"], tmp_path / "out"
    with pytest.raises(UsageError, match="--report-scores has no rows"):
        tune(bundle, tmp_path / "no-such-data", out, spec_of(report_scores=True), house.home)
    with pytest.raises(UsageError, match="7 checkpoints were asked for, but the run has 6 steps"):
        house.tune(out, checkpoints=7)
    assert list(tmp_path.iterdir()) == []
