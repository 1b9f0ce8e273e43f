import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from artifacts import edit_json
from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.models.adapted import load_adapted, load_bottlenecked, load_replaced
from offsite.models.hugging_face_calls import quiet
from offsite.models.loading import load_model
from offsite.models.modules.declared_shapes import bottleneck_shapes
from offsite.models.tokenizers import context_length, load_tokenizer
from offsite.models.torch_tensors import read_tensor
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.files import Written, sha256_of
from offsite.storage.safetensors_files import copied, from_array, write_safetensors
from offsite.storage.snapshot import Snapshot
from tiny import FAMILIES, tiny_base

CPU = torch.device("cpu")
OUT = "model.layers.1.mlp.down_proj.bottleneck"  # a bottleneck's place in a tiny Llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("load") / "base", blocks=2)


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


def rewrite(folder, change):
    """Write the folder's tensors again after a change to the dictionary of them."""
    tensors = {name: copied(tensor) for name, tensor in open_checkpoint(folder).tensors.items()}
    change(tensors)
    write_safetensors(folder / "new", tensors.values())
    (folder / "new").rename(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_folder_loads_frozen_in_the_named_dtype(tmp_path, family, tied):
    model = load_model(tiny_base(tmp_path / "b", family, 2, tied=tied), dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_every_wrong_tensor_is_listed(copy):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = from_array("model.norm.weight", np.ones(31, np.float32), "F32")
        tensors["model.layers.7.mlp.up_proj.weight"] = from_array(
            "model.layers.7.mlp.up_proj.weight", np.ones((2, 2)), "F32"
        )

    rewrite(copy, change)
    with pytest.raises(IncompatibleError) as caught:
        load_model(copy, dtype=torch.float32, device=CPU)
    reasons = "\n".join(caught.value.reasons)
    assert "missing tensor model.layers.1.mlp.up_proj.weight" in reasons
    assert "unexpected tensor model.layers.7.mlp.up_proj.weight" in reasons
    assert "mismatched tensor model.norm.weight: found shape [31], expected [32]" in reasons


def test_a_truncated_file_is_named(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        load_model(copy, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
        {"attn_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": "kernels:someone"}},
        {"transformers_weights": "other.bin"},
    ],
)
def test_a_config_that_reaches_outside_is_refused(copy, changes):
    edit(copy / "config.json", **changes)
    with pytest.raises(IncompatibleError, match="not a plain checkpoint") as caught:
        load_model(copy, dtype=torch.float32, device=CPU)
    assert str(next(iter(changes))) in str(caught.value)


def test_a_tokenizer_with_code_of_its_own_is_refused(copy):
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    with pytest.raises(IncompatibleError, match="not a plain checkpoint"):
        load_tokenizer(copy)


def test_a_stray_adapter_is_refused(copy):
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(IncompatibleError, match=r"adapter_config\.json"):
        load_model(copy, dtype=torch.float32, device=CPU)


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        load_model(tmp_path, dtype=torch.float32, device=CPU)


def test_an_unknown_model_type_is_an_error_of_ours(copy):
    edit(copy / "config.json", model_type="no_such_type", architectures=["NoSuch"])
    with pytest.raises(IncompatibleError, match="cannot load"):
        load_model(copy, dtype=torch.float32, device=CPU)


def test_whatever_a_library_raises_on_a_strange_config_is_an_error_of_ours(copy):
    edit(copy / "config.json", hidden_act=0)
    with pytest.raises(IncompatibleError, match="cannot load"):
        load_model(copy, dtype=torch.float32, device=CPU)


def test_damaged_json_is_named(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(StorageError, match=r"config\.json"):
        load_model(copy, dtype=torch.float32, device=CPU)


def test_a_tokenizer_without_an_end_token_is_refused(copy):
    edit(copy / "tokenizer_config.json", eos_token=None)
    with pytest.raises(IncompatibleError, match="end token"):
        load_tokenizer(copy)


def test_the_context_comes_from_the_config(base):
    assert context_length(base) == 64


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_does_more_than_lora_is_refused(base, tmp_path, changes, found):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2} | changes))
    with pytest.raises(IncompatibleError, match=found):
        load_adapted(base, tmp_path, dtype=torch.float32, device=CPU)


def test_an_adapter_folder_without_a_config_is_none(base, tmp_path):
    with pytest.raises(UsageError, match="not a LoRA adapter"):
        load_adapted(base, tmp_path, dtype=torch.float32, device=CPU)


def test_an_adapter_for_other_modules_is_listed(base, tmp_path):
    target = "model.layers.1.mlp.up_proj"
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": [target]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    a, b, stray = (
        f"base_model.model.{name}.weight" for name in (f"{target}.lora_A", f"{target}.lora_B", "model.norm.lora_A")
    )

    def write(**shapes):
        (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)
        names = {"a": a, "b": b, "stray": stray}
        arrays = [from_array(names[key], np.ones(shape, np.float32), "F32") for key, shape in shapes.items()]
        write_safetensors(tmp_path / "adapter_model.safetensors", arrays)

    write(a=(2, 32), b=(48, 2))
    adapted = load_adapted(base, tmp_path, dtype=torch.float32, device=CPU)
    assert sum(".lora_A." in name for name, _ in adapted.named_parameters()) == 1
    write(a=(2, 32), stray=(2, 32))
    with pytest.raises(IncompatibleError) as caught:
        load_adapted(base, tmp_path, dtype=torch.float32, device=CPU)
    assert any("missing" in reason and b in reason for reason in caught.value.reasons)
    assert any("unexpected" in reason and stray in reason for reason in caught.value.reasons)


def test_tensors_of_another_file_take_their_place_or_are_listed(base, tmp_path):
    def write(**shapes):
        (tmp_path / "w").unlink(missing_ok=True)
        names = {"norm": "model.layers.1.input_layernorm.weight", "stray": "model.layers.9.input_layernorm.weight"}
        write_safetensors(
            tmp_path / "w",
            [from_array(names[key], np.full(shape, 7, np.float32), "F32") for key, shape in shapes.items()],
        )
        return tmp_path

    model = load_replaced(base, write(norm=32), "w", dtype=torch.float32, device=CPU)
    assert set(model.model.layers[1].input_layernorm.weight.tolist()) == {7.0}
    with pytest.raises(IncompatibleError) as caught:
        load_replaced(base, write(norm=31, stray=32), "w", dtype=torch.float32, device=CPU)
    assert [reason.split()[:3] for reason in caught.value.reasons] == [
        ["unexpected", "tensor", "model.layers.9.input_layernorm.weight"],
        ["tensor", "model.layers.1.input_layernorm.weight:", "found"],
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_reading_a_tensor_gives_its_bits(tmp_path, dtype):
    folder = tiny_base(tmp_path / "b", "gpt2", 1, dtype=dtype)
    model = load_model(folder, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, device=CPU)
    own = dict(model.named_parameters())
    for name, tensor in open_checkpoint(folder).tensors.items():
        assert torch.equal(read_tensor(tensor), own[name])
        assert read_tensor(tensor, torch.float64).dtype is torch.float64


def test_quiet_puts_the_users_settings_back(base):
    from transformers.utils import logging as theirs

    theirs.set_verbosity(logging.INFO)
    try:
        with quiet():
            assert theirs.get_verbosity() == logging.ERROR
        assert theirs.get_verbosity() == logging.INFO
        assert theirs.is_progress_bar_enabled()
    finally:
        theirs.set_verbosity_warning()


def test_loading_says_nothing(base, capfd):
    load_model(base, dtype=torch.float32, device=CPU)
    load_tokenizer(base)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda w: w.pop(next(iter(w))), "missing tensor"),
        (
            lambda w: w.update({OUT.replace("1", "9") + ".up.bias": np.zeros(32, np.float32)}),
            "unexpected",
        ),
        (lambda w: w.update({"model.norm.weight": np.zeros(32, np.float32)}), "unexpected tensor model.norm.weight"),
        (
            lambda w: w.update({f"{OUT}.up.weight": np.zeros((33, 3), np.float32)}),
            "found shape .33, 3.",
        ),
        (lambda w: w.update({f"{OUT}.down.bias": np.zeros(2, np.float32)}), "found shape"),
        (lambda w: w.clear(), "the file holds no tensor"),
    ],
)
def test_bottlenecks_that_do_not_fit(tmp_path, spoil, says):
    base = tiny_base(tmp_path / "base", "llama", 2)
    held = {}
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        for name, shape in bottleneck_shapes(f"model.layers.1.{path}", 32, 3).items():
            held[name] = np.zeros(shape, np.float32)
    spoil(held)
    file = tmp_path / "bottleneck.safetensors"
    write_safetensors(file, [from_array(name, array, "F32") for name, array in held.items()])
    with pytest.raises(IncompatibleError, match="do not fit the model") as caught:
        load_bottlenecked(base, file.parent, file.name, dtype=torch.float32, device=torch.device("cpu"))
    assert any(re.search(says, reason) for reason in caught.value.reasons), caught.value.reasons


def test_a_declared_config_that_makes_a_model_much_larger_than_its_files(tmp_path: Path) -> None:
    """GPT-Neo computes a mask of positions times positions in every block."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    settings = GPTNeoConfig(
        vocab_size=32,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        max_position_embeddings=64,
        attention_types=[[["global"], 1]],
    )
    GPTNeoForCausalLM(settings).save_pretrained(tmp_path)
    files = [path for path in tmp_path.iterdir() if path.name in ("config.json", "model.safetensors")]
    listed = [Written(path.name, path.stat().st_size, sha256_of(path)) for path in files]
    load_model(Snapshot(tmp_path, listed), dtype=torch.float32, device=CPU)
    edit_json(tmp_path / "config.json", max_position_embeddings=2**20)
    listed = [Written(path.name, path.stat().st_size, sha256_of(path)) for path in files]
    with pytest.raises(IncompatibleError, match="larger than its tensors"):
        load_model(Snapshot(tmp_path, listed), dtype=torch.float32, device=torch.device("cpu"))
