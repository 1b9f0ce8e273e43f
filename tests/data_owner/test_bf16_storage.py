"""Frozen blocks in bf16 under fp32 arithmetic: the same numbers, half of the memory."""

import weakref

import numpy as np
import pytest
import torch

from artifacts import packed
from offsite.config import TuneSpec
from offsite.data.tokens import Example, collate
from offsite.data_owner import bf16_storage as narrow
from offsite.data_owner import permissions
from offsite.data_owner.bf16_storage import Narrow, hold_bases_narrow, hold_narrow
from offsite.data_owner.plan import plan_tune
from offsite.data_owner.tune import tune
from offsite.errors import UsageError
from offsite.kernels.activation_checkpointing import keep_activations, recompute
from offsite.kernels.cpu.fused_modules import fuse
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.protocol.contents import ADAPTER_WEIGHTS, WEIGHTS_OF
from offsite.protocol.verify import verify_bundle
from offsite.storage.safetensors_files import open_checkpoint
from offsite.training.label_losses import label_losses
from tiny import KINDS, VISION_KINDS, tiny_base, tiny_parties, tiny_rows, tiny_vision_base

CPU = torch.device("cpu")


def blocks_of(model):
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def narrow_base(folder, make):
    """A checkpoint in bf16."""
    model = load_model(make(folder / "wide"), dtype=torch.bfloat16, device=CPU)
    model.save_pretrained(folder / "narrow")
    return folder / "narrow"


def both(folder):
    """The same model with wide and with narrow frozen blocks; the first and the last train."""
    wide, narrow = (load_model(folder, dtype=dtype, device=CPU) for dtype in (torch.float32, torch.bfloat16))
    hold_narrow(narrow, blocks_of(narrow), (0, 2))
    for model in (wide, narrow):
        fuse(model)
        for index in ("0", "2"):
            blocks_of(model).get_submodule(index).requires_grad_(True)
    held = blocks_of(narrow).get_submodule("1")
    assert isinstance(held, Narrow)
    assert {matrix.dtype for matrix in held.parameters() if matrix.dim() > 1} == {torch.bfloat16}
    return wide, narrow


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(one.grad for one in model.parameters() if one.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
def test_language_models_compute_the_same(tmp_path, kind):
    folder = narrow_base(tmp_path, lambda folder: tiny_base(folder, blocks=3, **KINDS[kind]))
    generator = np.random.default_rng(0)
    batch = collate([Example(i, generator.integers(0, 300, length), 1) for i, length in enumerate((5, 14, 9))])
    wide, narrow = both(folder)
    expected = gradients(wide, label_losses(split_backbone_and_head(wide), batch)[0])
    network = split_backbone_and_head(narrow)
    for again in (False, True, False):
        (recompute if again else keep_activations)(blocks_of(narrow))
        found = gradients(narrow, label_losses(network, batch)[0])
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in VISION_KINDS if "timm" not in kind])
def test_encoders_compute_the_same(tmp_path, kind):
    wide, narrow = both(narrow_base(tmp_path, lambda folder: tiny_vision_base(folder, kind, blocks=3)))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected, found = (
        gradients(model, model(pixel_values=pixels).last_hidden_state.square().sum()) for model in (wide, narrow)
    )
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_of_a_frozen_block_only_its_activations_are_kept(tmp_path):
    """What comes back from packing is all that the graph keeps: no wide matrix among it."""
    _, model = both(narrow_base(tmp_path, lambda folder: tiny_base(folder, blocks=3)))
    block = blocks_of(model).get_submodule("1")
    wide = []
    run = block.block.forward
    block.block.forward = lambda *given, **named: (
        wide.extend(map(weakref.ref, block.block.parameters())) or run(*given, **named)
    )
    loss = label_losses(split_backbone_and_head(model), collate([Example(0, np.arange(9), 1)]))[0]
    matrices = [one() for one in wide if one() is not None and one().dim() > 1]
    assert wide
    assert not matrices
    loss.backward()


def test_what_stays_frozen_beside_what_trains_is_narrow_too(tmp_path):
    _, model = both(narrow_base(tmp_path, lambda folder: tiny_base(folder, blocks=3)))
    block = blocks_of(model).get_submodule("0").requires_grad_(False)
    trains = next(matrix for matrix in block.parameters() if matrix.dim() > 1).requires_grad_(True)
    hold_bases_narrow(blocks_of(model), (0, 2))
    held = blocks_of(model).get_submodule("0")
    assert isinstance(held, Narrow)
    assert trains.dtype == torch.float32
    assert {one.dtype for one in held.parameters() if one.dim() > 1 and one is not trains} == {torch.bfloat16}
    assert not isinstance(blocks_of(model).get_submodule("2"), Narrow)  # all of it trains


def test_a_recomputed_block_keeps_nothing_itself(tmp_path, monkeypatch):
    _, model = both(narrow_base(tmp_path, lambda folder: tiny_base(folder, blocks=3)))
    monkeypatch.delattr(narrow, "saved_tensors_hooks")
    recompute(blocks_of(model))
    label_losses(split_backbone_and_head(model), collate([Example(0, np.arange(9), 1)]))[0].backward()
    keep_activations(blocks_of(model))
    with pytest.raises(NameError):
        label_losses(split_backbone_and_head(model), collate([Example(0, np.arange(9), 1)]))


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Bundles by name, rows, and who tunes."""
    folder = tmp_path_factory.mktemp("house")
    parties, base = tiny_parties(folder), tiny_base(folder / "base", blocks=5)
    settings = {
        "bf16": {"dtype": "bf16", "keep": 2},
        "left-out": {"dtype": "bf16", "prune": 0.5, "prune_by": "magnitude", "zeros": "left-out"},
        "fp32": {"dtype": "fp32", "keep": 2},
    }
    bundles = {name: packed(base, folder / name, parties, **own).folder for name, own in settings.items()}
    return bundles, tiny_rows(folder / "rows.jsonl", 14), parties.data_owner


def spec_of(**settings):
    usual = {"rank": 4, "lr": 5e-3, "batch_size": 4, "epochs": 2, "compute": "fp32", "threads": 1, "device": "cpu"}
    return TuneSpec(**(usual | settings))


@pytest.mark.parametrize("method", ["lora", "full", "bottleneck"])  # Llama's blocks have no biases for BitFit
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"memory": "64GiB"}])
@pytest.mark.parametrize("bundle", ["bf16", "left-out"])
def test_the_return_is_the_same(house, tmp_path, method, more, bundle):
    bundles, rows, home = house
    returned = [
        tune(bundles[bundle], rows, tmp_path / str(narrow), spec_of(method=method, narrow_weights=narrow, **more), home)
        for narrow in (False, True)
    ]
    name = WEIGHTS_OF[method]
    assert len({(one.folder / name).read_bytes() for one in returned}) == 1


@pytest.mark.parametrize(
    ("bundle", "settings", "expected"),
    [
        ("bf16", {}, True),  # of which the test says that it is large
        ("bf16", {"memory": "64GiB"}, True),
        ("left-out", {"memory": "64GiB"}, True),
        ("left-out", {}, False),
        ("bf16", {"narrow_weights": False}, False),
        ("bf16", {"lanes": 2}, False),
        ("bf16", {"compute": "bf16"}, False),
        ("fp32", {}, False),  # they would be rounded
    ],
)
def test_they_are_held_narrow_where_that_rounds_nothing(house, tmp_path, monkeypatch, bundle, settings, expected):
    bundles, rows, home = house
    held = []

    def counted(model, *given):
        held.append(given)
        hold_narrow(model, *given)

    monkeypatch.setattr("offsite.data_owner.tune.hold_narrow", counted)
    sizes = {
        name: sum(one.size for one in open_checkpoint(folder).tensors.values()) for name, folder in bundles.items()
    }
    assert sizes["left-out"] < sizes["bf16"]
    monkeypatch.setattr(permissions, "LARGE", sizes["bf16"])
    bases = []
    monkeypatch.setattr("offsite.data_owner.tune.hold_bases_narrow", lambda *given: bases.append(given))
    tune(bundles[bundle], rows, tmp_path / "return", spec_of(**settings), home)
    assert bool(held) == bool(bases) == expected
    plan = plan_tune(verify_bundle(bundles[bundle], home), rows, spec_of(**settings))
    assert expected == any(term.name == "one block in fp32" for term in plan.peak.terms)


def test_an_interrupted_run_goes_on_with_narrow_weights(house, tmp_path):
    bundles, rows, home = house

    def stop(event):
        if event.stage == "tuning" and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(bundles["bf16"], rows, tmp_path / "return", spec_of(), home, progress=stop)
    resumed = tune(bundles["bf16"], rows, tmp_path / "return", spec_of(narrow_weights=True), home, resume=True)
    whole = tune(bundles["bf16"], rows, tmp_path / "whole", spec_of(), home)
    first, second = ((one.folder / ADAPTER_WEIGHTS).read_bytes() for one in (resumed, whole))
    assert first == second


def test_weights_that_bf16_would_round_stay_as_they_are(house, tmp_path):
    bundles, rows, home = house
    with pytest.raises(UsageError, match="would round") as refused:
        tune(bundles["fp32"], rows, tmp_path / "return", spec_of(narrow_weights=True), home)
    assert refused.value.reasons == ("it has tensors of F32",)
    with pytest.raises(UsageError, match="would round"):
        plan_tune(verify_bundle(bundles["fp32"], home), rows, spec_of(narrow_weights=True))
    assert tune(bundles["fp32"], rows, tmp_path / "bf16", spec_of(narrow_weights=True, compute="bf16"), home)
