"""What trains is what the table says, in every family: the trained blocks' linear maps, tensors, or biases."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from offsite.config import TuneSpec
from offsite.data_owner.check_permissions import require_permitted
from offsite.data_owner.methods import METHODS
from offsite.errors import IncompatibleError
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.hugging_face_calls import quiet
from offsite.models.loading import load_model
from offsite.models.mixture import in_files
from tiny import EVERY_KIND, KINDS, tiny_base, tiny_bundle, tiny_parties


@pytest.mark.parametrize("kind", ["llama untied", "mixtral", "qwen2_moe, dense blocks, windows"])
def test_a_long_list_of_targets_is_no_longer_set(tmp_path, kind):
    """PEFT shortens lists of twenty and more to endings."""
    family = ARCHITECTURES[KINDS[kind]["family"]]
    base = tiny_base(tmp_path / "b", blocks=13, **KINDS[kind])
    bundle = tiny_bundle(base, tmp_path / "bundle", tiny_parties(tmp_path), bottom=2, top=3)
    assert len(bundle.manifest.lora_targets) >= 20
    model = load_model(bundle.folder, dtype=torch.float32, device=torch.device("cpu"))
    METHODS["lora"](model, bundle.manifest, TuneSpec(rank=2, compute="fp32", device="cpu", threads=1))
    trains = {name.partition(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == set(bundle.manifest.lora_targets)
    assert trains == {family.in_block(index, path) for index in (0, 1, 10, 11, 12) for path in family.lora_linears}


def test_why_mixtures_take_lora_on_attention_alone(tmp_path):
    """PEFT takes the MLP of a dense block for the experts of the others; once it does not, the rows may permit more."""
    base = tiny_base(tmp_path / "b", blocks=3, **KINDS["qwen3_moe tied, every second block dense"])
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    named = [f"model.layers.0.mlp.{path}" for path in ("gate_proj", "up_proj", "down_proj")]
    with quiet():
        inject_adapter_in_model(LoraConfig(target_modules=named), model)
    trains = {name.partition(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {"model.layers.1.mlp.experts", "model.layers.1.mlp.experts.base_layer"}


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_trainable_set_is_the_tables(tmp_path, kind, method):
    family = ARCHITECTURES[KINDS[kind]["family"]]
    bundle = tiny_bundle(
        tiny_base(tmp_path / "b", blocks=5, **KINDS[kind]), tmp_path / "bundle", tiny_parties(tmp_path), keep=2
    )
    model = load_model(bundle.folder, dtype=torch.float32, device=torch.device("cpu"))
    spec = TuneSpec(method=method, rank=2, compute="fp32", device="cpu", threads=1)
    returned = METHODS[method](model, bundle.manifest, spec)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = (0, 3)
    if method == "full":
        config = model.config.to_dict()
        names = {family.in_block(index, path) for index in trained for path in family.block_tensors(config, index)}
        assert trains == set(returned)
        assert set(in_files(family, returned)) == names == set(bundle.manifest.tensors)
        decayed = {name for name in returned if family.is_linear(name)}
        assert decayed.isdisjoint(name for name, tensor in returned.items() if tensor.dim() == 1)
        assert {name for name in returned if returned[name].dim() > 1} - decayed == (
            {family.in_block(i, "mlp.gate.weight") for i in trained} & set(returned)
        )
    else:
        pairs = {f"{family.in_block(i, path)}.lora_{x}" for i in trained for path in family.lora_linears for x in "AB"}
        assert trains == {f"{pair}.default.weight" for pair in pairs}
        assert set(returned) == {f"base_model.model.{pair}.weight" for pair in pairs}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_bitfit_trains_the_biases(tmp_path, kind):
    """Those of linear maps and of norms, and no weight of a norm, which has one dimension too."""
    family = ARCHITECTURES[KINDS[kind]["family"]]
    base = tiny_base(tmp_path / "b", blocks=5, **KINDS[kind])
    bundle = tiny_bundle(base, tmp_path / "bundle", tiny_parties(tmp_path), keep=2)
    spec = TuneSpec(method="bitfit", compute="fp32", device="cpu", threads=1)
    model = load_model(bundle.folder, dtype=torch.float32, device=torch.device("cpu"))
    modules = dict(model.get_submodule(family.blocks).named_modules())
    biases = {
        f"{family.blocks}.{path}.bias"
        for path, module in modules.items()
        if path.partition(".")[0] in ("0", "3") and isinstance(getattr(module, "bias", None), torch.nn.Parameter)
    }
    if not biases:
        with pytest.raises(IncompatibleError, match="have none"):
            require_permitted(bundle.manifest, spec)
        return
    require_permitted(bundle.manifest, spec)
    returned = METHODS["bitfit"](model, bundle.manifest, spec)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == set(returned) == biases


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_bottlenecks_start_as_the_identity_and_train_alone(tmp_path, kind):
    family = ARCHITECTURES[KINDS[kind]["family"]]
    base = tiny_base(tmp_path / "b", blocks=5, **KINDS[kind])
    bundle = tiny_bundle(base, tmp_path / "bundle", tiny_parties(tmp_path), keep=2)
    model = load_model(bundle.folder, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(3, 15)[None]
    before = model(input_ids=ids).logits
    spec = TuneSpec(method="bottleneck", width=3, compute="fp32", device="cpu", threads=1)
    returned = METHODS["bottleneck"](model, bundle.manifest, spec)
    assert torch.equal(model(input_ids=ids).logits, before)
    places = [family.in_block(index, path) for index in (0, 3) for path in (family.attention_out, family.mlp_out)]
    parts = ("down.weight", "down.bias", "up.weight", "up.bias")
    assert set(returned) == {f"{place}.bottleneck.{part}" for place in places for part in parts}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(returned)
    hidden = {}  # what goes in and comes out, before Falcon adds to it in place
    module = model.get_submodule(places[-1])
    module.inner.register_forward_hook(lambda m, args, out: hidden.update(inside=out.clone()))
    module.register_forward_hook(lambda m, args, out: hidden.update(outside=out.clone()))
    with torch.no_grad():
        for parameter in returned.values():
            parameter.normal_(std=0.3)
    assert not torch.allclose(model(input_ids=ids).logits, before)
    down, up = (
        [returned[f"{places[-1]}.bottleneck.{half}.{part}"] for part in ("weight", "bias")] for half in ("down", "up")
    )
    x = hidden["inside"]
    expected = x + torch.nn.functional.gelu(x @ down[0].T + down[1]) @ up[0].T + up[1]
    torch.testing.assert_close(hidden["outside"], expected, rtol=1e-4, atol=1e-5)
