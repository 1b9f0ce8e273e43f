"""What only a card can confirm: `make test-gpu`. The same code runs on the CPU in every run of the tests.

On a card: tuning ends where the CPU's ends, resumes bit for bit, a step makes the CPU wait for nothing, attention runs
torch's flash kernels, and two cards make what one makes.
"""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from offsite.config import TuneSpec
from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.tune import tune
from offsite.kernels import micro_batch_runner, prepare
from offsite.kernels.cuda.flash_attention import use_flash_attention
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.models.torch_tensors import read_tensor
from offsite.protocol.contents import ADAPTER_WEIGHTS
from offsite.storage.safetensors_files import read_header
from offsite.training.label_losses import label_losses
from offsite.training.loop import _accumulate
from offsite.training.master_weights import MasterWeights
from offsite.training.run_log import log_file
from offsite.training.task import Batching
from tiny import tiny_base, tiny_house

CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NO_CARD = pytest.mark.skipif(not CARDS, reason="there is no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CARD])]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return tiny_house(tmp_path_factory.mktemp("house"), both={}, top={"bottom": 0})


def tuned(house, bundle, out, *, device, progress=lambda event: None, resume=False, **settings):
    bundles, rows, home = house
    usual = {"rank": 4, "lr": 5e-3, "max_steps": 12, "batch_size": 5, "compute": "fp32", "threads": 1}
    spec = TuneSpec(device=device, **(usual | settings))
    return tune(bundles[bundle], rows, out, spec, home, progress=progress, resume=resume)


def losses(out):
    records = [json.loads(line) for line in log_file(out).read_text().splitlines()]
    return torch.tensor([record["loss"] for record in records if record["event"] == "step"])


def weights(returned):
    return {name: read_tensor(it) for name, it in read_header(returned / ADAPTER_WEIGHTS).items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bundle", ["both", "top"])  # with none at the bottom, the frozen blocks' output is cached
@pytest.mark.parametrize(
    ("compute", "tolerance"), [("fp32", 1e-3), pytest.param("bf16", 3e-2, marks=pytest.mark.every_form)]
)
def test_losses_are_those_of_the_cpu(house, tmp_path, device, bundle, compute, tolerance):
    """On the CPU with another size of micro-batch, so that something differs there too."""
    tuned(house, bundle, tmp_path / "cpu", device="cpu", micro_batch_tokens=1)
    tuned(house, bundle, tmp_path / "there", device=device, compute=compute)
    torch.testing.assert_close(losses(tmp_path / "there"), losses(tmp_path / "cpu"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_makes_the_same_bytes(house, tmp_path, device):
    def stop(event):
        if event.stage == "tuning" and event.done == 5:
            raise KeyboardInterrupt

    whole = tuned(house, "both", tmp_path / "whole", device=device, lora_dropout=0.2)
    with pytest.raises(KeyboardInterrupt):
        tuned(house, "both", tmp_path / "parts", device=device, lora_dropout=0.2, progress=stop)
    parts = tuned(house, "both", tmp_path / "parts", device=device, lora_dropout=0.2, resume=True)
    assert (whole.folder / ADAPTER_WEIGHTS).read_bytes() == (parts.folder / ADAPTER_WEIGHTS).read_bytes()


@contextlib.contextmanager
def waits_are_errors(device):
    """Any operation that makes the CPU wait for the card raises."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_micro_batches_make_the_cpu_wait_for_nothing(tmp_path, device, family):
    where = torch.device(device)
    model = load_model(tiny_base(tmp_path / "base", family, 2), dtype=torch.float32, device=where)
    network = split_backbone_and_head(model)
    prepare(model, where, torch.float32)
    model.requires_grad_(True)
    examples = tuple(Example(i, np.arange(length) + 3, 2) for i, length in enumerate((9, 5, 7, 30)))
    task, found = (
        TextTask(network, examples, (), Batching(rows=4, tokens=1, seed=0)),
        MasterWeights(dict(model.named_parameters())),
    )
    looked = []

    class Watched(TextTask):
        def loss_terms(self, rows, epoch):
            with waits_are_errors(device):
                terms = super().loss_terms(rows, epoch)
                looked.append(rows)
                return terms

    with micro_batch_runner(found.working.values(), where) as run:
        _accumulate(task, found, run, 0, range(4), 1)  # the first pass may allocate and choose kernels
        sums = _accumulate(Watched(**vars(task)), found, run, 0, range(4), 1)
    assert len(looked) == 4
    assert sums["loss"] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_padded_batch_runs_flash_attention_alone(tmp_path, device):
    model = load_model(tiny_base(tmp_path / "base", "llama", 2), dtype=torch.bfloat16, device=torch.device(device))
    network = split_backbone_and_head(model)
    assert use_flash_attention(model).count == 2
    batch = collate([Example(i, np.arange(length) + 3, 2) for i, length in enumerate((9, 30))])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        total, _ = label_losses(network, batch)
    assert torch.isfinite(total)


@pytest.mark.gpu
@pytest.mark.skipif(CARDS < 2, reason="there are no two CUDA devices here")
def test_two_cards_make_what_one_makes(house, tmp_path):
    bundles, rows, home = house
    settings = tmp_path / "settings.toml"
    settings.write_text('[tune]\nrank = 4\nlr = 5e-3\nbatch_size = 5\ncompute = "fp32"\n')
    words = ["tune", bundles["both"].folder, "--data", rows, "--config", settings, "--home", home.folder]
    words = [*map(str, words), "--max-steps", "12", "--out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "offsite"]
        subprocess.run([*command, *words, str(tmp_path / str(count))], check=True, env=environment)
    for name, tensor in weights(tmp_path / "2").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "1")[name], rtol=1e-3, atol=1e-4)
