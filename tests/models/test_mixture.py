"""Experts in files and in modules: one map, held against transformers' own tables; and what runs them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from offsite.errors import IncompatibleError
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.models.mixture import experts_implementation, in_files
from offsite.storage.checkpoint_folder import open_checkpoint
from tiny import KINDS, tiny_base, tiny_config

MIXTURES = [kind for kind in KINDS if ARCHITECTURES[KINDS[kind]["family"]].experts]
IDS = torch.tensor([[1, 5, 9, 40, 77, 3, 200], [1, 301, 12, 12, 8, 90, 4]])


def made(kind: str, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(kind, 4), **settings)


@pytest.mark.parametrize("kind", MIXTURES)
def test_files_hold_what_transformers_would_save(kind: str) -> None:
    model, family = made(kind), ARCHITECTURES[KINDS[kind]["family"]]
    ours, theirs = in_files(family, model.state_dict()), revert_weight_conversion(model, model.state_dict())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", MIXTURES)
def test_modules_hold_what_transformers_would_load(kind: str) -> None:
    model, family = made(kind), ARCHITECTURES[KINDS[kind]["family"]]
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    for name, parameter in model.named_parameters():
        for stored in in_files(family, {name: parameter}):
            assert rename_source_key(stored, renamings, converters)[0] == name


class Looks(TorchDispatchMode):
    """Counts the operations for which an accelerator has to be waited for, but `tolist`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._unique2, torch.ops.aten._local_scalar_dense):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_expert_is_waited_for() -> None:
    model = made("mixtral", experts_implementation=experts_implementation()).eval()
    with torch.no_grad(), Looks() as looks:
        model.model.layers[0].mlp(torch.randn(1, 7, model.config.hidden_size))
    assert looks.found == []


@pytest.mark.parametrize("kind", MIXTURES)
def test_nothing_is_copied(kind: str) -> None:
    """So that what is written into a matrix is in the stack."""
    model, family = made(kind), ARCHITECTURES[KINDS[kind]["family"]]
    for name, parameter in model.named_parameters():
        found = in_files(family, {name: parameter})
        assert sum(tensor.numel() for tensor in found.values()) == parameter.numel()
        with torch.no_grad():
            for place, tensor in enumerate(found.values()):
                tensor.fill_(place)
        assert parameter.unique().tolist() == list(range(len(found)))


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_compute_what_transformers_loop_does(kind: str, dtype: torch.dtype) -> None:
    def outcome(implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = made(kind, experts_implementation=implementation).to(dtype)
        assert model.config._experts_implementation == implementation
        found = model(input_ids=IDS, labels=IDS, use_cache=False)
        found.loss.backward()
        return found.logits, {name: parameter.grad for name, parameter in model.named_parameters()}

    ours, again, theirs = outcome(experts_implementation()), outcome(experts_implementation()), outcome("eager")
    assert torch.equal(ours[0], theirs[0])
    near = 1e-6 if dtype == torch.float32 else 2e-4  # gradients add up in another order
    for name, gradient in theirs[1].items():
        assert torch.equal(ours[1][name], again[1][name])
        torch.testing.assert_close(ours[1][name], gradient, rtol=near, atol=near)
    assert max(float(gradient.abs().max()) for gradient in theirs[1].values()) > 20 * near


def test_an_expert_that_no_token_chooses(tmp_path: Path) -> None:
    model = load_model(tiny_base(tmp_path / "b", "qwen3_moe", 2), dtype=torch.float32, device=torch.device("cpu"))
    assert model.config._experts_implementation == experts_implementation()
    stacks = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    for stack in stacks:
        stack.requires_grad_(True)
    model(input_ids=IDS[:1, :1]).logits.sum().backward()  # one token chooses two of four
    for stack in stacks:
        assert stack.grad is not None
        assert [bool(expert.any()) for expert in stack.grad].count(True) == 2


def test_the_routers_own_loss_is_off(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "b", "mixtral", 2, output_router_logits=True)
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    found = model(input_ids=IDS, labels=IDS)
    assert found.aux_loss is None
    expected = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)


@pytest.mark.parametrize(
    ("kind", "kept", "dense"),
    [
        ("qwen2_moe", [0, 3], []),
        ("qwen2_moe, dense blocks, windows", [0, 1, 3], [0, 2]),
        ("qwen3_moe tied, every second block dense", [0, 1, 3, 4], [0, 3]),
    ],
)
def test_dense_blocks_go_with_the_kept(kind: str, kept: list[int], dense: list[int]) -> None:
    family, config = ARCHITECTURES[KINDS[kind]["family"]], tiny_config(kind, 5).to_dict()
    cut = family.subset(config, kept)
    assert (cut["mlp_only_layers"], cut["decoder_sparse_step"]) == (dense, 1)
    for new, old in enumerate(kept):
        assert family.block_tensors(cut, new) == family.block_tensors(config, old)
    assert family.subset(cut, range(len(kept))) == cut


@pytest.mark.parametrize("found", [0, -1, 1025, 10**12, True, 4.0, "4", [4], None])
def test_a_number_of_experts_that_cannot_be(found: object) -> None:
    family = ARCHITECTURES["mixtral"]
    with pytest.raises(IncompatibleError, match=r"how many block_sparse_moe\.experts"):
        family.block_tensors({"num_local_experts": found}, 0)


def test_the_number_of_experts() -> None:
    qwen3, path = ARCHITECTURES["qwen3_moe"], "mlp.experts"
    assert qwen3.number_of(path, {}) == 128
    assert qwen3.number_of(path, {"num_experts": 4}) == qwen3.number_of(path, {"num_local_experts": 4}) == 4
    with pytest.raises(IncompatibleError, match="how many"):
        qwen3.number_of(path, {"num_experts": 4, "num_local_experts": 8})


@pytest.mark.parametrize(
    "config",
    [
        {"mlp_only_layers": 1},
        {"mlp_only_layers": "01"},
        {"mlp_only_layers": {"0": 1}},
        {"mlp_only_layers": [7] * 5000},
        {"decoder_sparse_step": 0},
        {"decoder_sparse_step": "1"},
        {"decoder_sparse_step": None},
        {"decoder_sparse_step": True},
    ],
)
def test_dense_blocks_that_cannot_be_told(config: dict[str, object]) -> None:
    with pytest.raises(IncompatibleError, match="which blocks have experts"):
        ARCHITECTURES["qwen3_moe"].block_tensors({"num_experts": 4, "num_experts_per_tok": 2, **config}, 0)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_only_attention_takes_lora(model_type: str, tmp_path: Path) -> None:
    """docs/decisions/0010 says why."""
    family = ARCHITECTURES[model_type]
    assert {path.partition(".")[0] for path in family.lora_linears} == {"self_attn"}
    names = open_checkpoint(tiny_base(tmp_path / "b", model_type, 1)).tensors
    assert {family.in_block(0, f"{path}.weight") for path in family.lora_linears} <= names.keys()
