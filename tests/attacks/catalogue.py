"""The attacks on what verify's rules guard: each names the one rule that stands in its way, and what that rule says.

Nearly all are by a hostile party with a valid, trusted key, which signs again after spoiling the folder.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from artifacts import GONE, edit_bundle_weights, edit_json, edit_weights, manifest_of, sign_again
from attacks.lab import Lab
from offsite.protocol.contents import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BOTTLENECK_WEIGHTS,
    CLASSIFIER,
    CONFIG,
    PROCESSOR,
    RETURNED_WEIGHTS,
    checkpoint_file,
)
from offsite.protocol.manifest import MANIFEST, SIGNATURE
from offsite.storage.checkpoint_folder import DECLARED_WEIGHTS, WEIGHTS
from offsite.storage.safetensors_files import read_header


@dataclass(frozen=True)
class Attack:
    name: str
    rule: str
    target: str
    says: str
    spoil: Callable[[Lab], None]


ATTACKS: list[Attack] = []


def attack(rule: str, target: str, says: str) -> Callable[[Callable[[Lab], None]], Callable[[Lab], None]]:
    """Register: `rule` alone catches it in "bundle", "lora" or "full" and gives a reason with `says` in it."""

    def register(spoil: Callable[[Lab], None]) -> Callable[[Lab], None]:
        ATTACKS.append(Attack(spoil.__name__, rule, target, says, spoil))
        return spoil

    return register


# --- the envelope ---


@attack("_signature", "bundle", "is not the signer's")
def manifest_changed_after_signing(lab: Lab) -> None:
    edit_json(lab.bundle / MANIFEST, max_rank=64)


@attack("_signature", "bundle", "is not the signer's")
def signature_of_a_return_reused_for_a_bundle(lab: Lab) -> None:
    lab.sign_bundle(kind="return")


@attack("_signature", "lora", "is not the signer's")
def signature_of_a_bundle_reused_for_a_return(lab: Lab) -> None:
    lab.sign_lora(kind="bundle")


@attack("_signature", "bundle", "is not the signer's")
def signed_by_a_stranger_in_the_owners_name(lab: Lab) -> None:
    sign_again(lab.bundle, lab.mallory)


@attack("_signature", "lora", "is not the signer's")
def signature_truncated(lab: Lab) -> None:
    (lab.lora / SIGNATURE).write_bytes((lab.lora / SIGNATURE).read_bytes()[:63])


@attack("_signature", "lora", "is not the signer's")
def signature_with_a_tail(lab: Lab) -> None:
    (lab.lora / SIGNATURE).write_bytes((lab.lora / SIGNATURE).read_bytes() + b"\n")


@attack("_signature", "bundle", "is not the signer's")
def signature_empty(lab: Lab) -> None:
    (lab.bundle / SIGNATURE).write_bytes(b"")


@attack("_trusted_signer", "bundle", "not trusted here")
def bundle_of_an_unknown_owner(lab: Lab) -> None:
    sign_again(lab.bundle, lab.mallory, issuer=lab.mallory.public_key.hex)


@attack("_addressee", "bundle", "addressed to")
def bundle_for_somebody_else(lab: Lab) -> None:
    lab.sign_bundle(recipient=lab.mallory.public_key.hex)


@attack("_signer_role", "bundle", "a bundle is signed by a model-owner, and this key is trusted as a data-owner")
def bundle_of_a_data_owner(lab: Lab) -> None:
    lab.parties.data_owner.trust("carol", lab.carol.public_key, "data-owner")
    sign_again(lab.bundle, lab.carol, issuer=lab.carol.public_key.hex)


@attack("_listing", "bundle", "'notes.txt' is not listed")
def unlisted_file(lab: Lab) -> None:
    (lab.bundle / "notes.txt").write_text("hello")


@attack("_listing", "bundle", "'pytorch_model.bin' is not listed")
def unlisted_pickle(lab: Lab) -> None:
    (lab.bundle / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")


@attack("_listing", "bundle", "'adapter_config.json' is not listed")
def unlisted_adapter_that_transformers_would_load(lab: Lab) -> None:
    (lab.bundle / ADAPTER_CONFIG).write_text("{}")


@attack("_listing", "bundle", "'chat_templates' is not a plain file")
def sub_folder(lab: Lab) -> None:
    (lab.bundle / "chat_templates").mkdir()


@attack("_listing", "bundle", "'notes.txt' is not a plain file")
def symlink_beside_the_files(lab: Lab) -> None:
    (lab.bundle / "notes.txt").symlink_to("/etc/passwd")


@attack("_listing", "bundle", "'merges.txt' is not a plain file")
def listed_file_is_a_link_out_of_the_folder(lab: Lab) -> None:
    (lab.bundle / "merges.txt").write_text("#version: 0.2\n")
    lab.sign_bundle()
    outside = lab.folder / "outside.txt"
    outside.write_text("#version: 0.2\n")
    (lab.bundle / "merges.txt").unlink()
    (lab.bundle / "merges.txt").symlink_to(outside)


@attack("_listing", "bundle", "merges.txt is missing")
def listed_file_left_out(lab: Lab) -> None:
    (lab.bundle / "merges.txt").write_text("#version: 0.2\n")
    lab.sign_bundle()
    (lab.bundle / "merges.txt").unlink()


@attack("_listing", "lora", "'README.md' is not listed")
def unlisted_file_in_a_return(lab: Lab) -> None:
    (lab.lora / "README.md").write_text("rows: 12")


@attack("_leftovers", "bundle", "'.DS_Store' is not listed")
def file_with_the_name_of_one_that_is_left_behind(lab: Lab) -> None:
    (lab.bundle / ".DS_Store").write_bytes(b"Bud1")


@attack("_leftovers", "bundle", "'.git' is not listed")
def hooks_in_a_folder_of_version_control(lab: Lab) -> None:
    (lab.bundle / ".git" / "hooks").mkdir(parents=True)
    (lab.bundle / ".git" / "hooks" / "post-checkout").write_text("#!/bin/sh\nrm -r ~\n")


@attack("_leftovers", "lora", "'.ipynb_checkpoints' is not listed")
def link_with_the_name_of_a_folder_that_is_left_behind(lab: Lab) -> None:
    (lab.lora / ".ipynb_checkpoints").symlink_to("/etc")


@attack("digests", "bundle", "the bytes of tokenizer.json are not those that were signed")
def a_byte_of_the_tokenizer_changed(lab: Lab) -> None:
    file = lab.bundle / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b'"1.0"', b'"1.1"', 1))


@attack("digests", "bundle", "the bytes of model.safetensors are not")
def a_byte_of_the_weights_changed(lab: Lab) -> None:
    raw = bytearray((lab.bundle / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (lab.bundle / "model.safetensors").write_bytes(raw)


@attack("digests", "lora", "the bytes of adapter_model.safetensors are not")
def a_byte_of_the_adapter_changed(lab: Lab) -> None:
    raw = bytearray((lab.lora / ADAPTER_WEIGHTS).read_bytes())
    raw[-4] ^= 1  # the lowest bits of a float
    (lab.lora / ADAPTER_WEIGHTS).write_bytes(raw)


# --- bundles ---


@attack("_bundle_files", "bundle", "may not hold pytorch_model.bin")
def signed_pickle(lab: Lab) -> None:
    (lab.bundle / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    lab.sign_bundle()


@attack("_bundle_files", "bundle", "may not hold adapter_config.json")
def signed_adapter_that_transformers_would_load(lab: Lab) -> None:
    (lab.bundle / ADAPTER_CONFIG).write_text("{}")
    lab.sign_bundle()


@attack("_bundle_files", "bundle", "may not hold modeling_llama.py")
def signed_code(lab: Lab) -> None:
    (lab.bundle / "modeling_llama.py").write_text("import os")
    lab.sign_bundle()


@attack("_bundle_files", "bundle", "may not hold processor_config.json")
def signed_file_that_nobody_expects(lab: Lab) -> None:
    (lab.bundle / "processor_config.json").write_text("{}")
    lab.sign_bundle()


@attack("_bundle_settings", "bundle", "tokenizer_config.json: key 'auto_map' is not permitted")
def tokenizer_asks_for_remote_code(lab: Lab) -> None:
    edit_json(lab.bundle / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil/repo--tokenizer.Evil", None]})
    lab.sign_bundle()


@attack("_bundle_settings", "bundle", "tokenizer_config.json: tokenizer_class")
def tokenizer_class_is_a_path(lab: Lab) -> None:
    edit_json(lab.bundle / "tokenizer_config.json", tokenizer_class="evil.module.Tokenizer")
    lab.sign_bundle()


@attack("_bundle_settings", "bundle", "tokenizer_config.json is not a JSON object")
def tokenizer_config_is_a_list(lab: Lab) -> None:
    (lab.bundle / "tokenizer_config.json").write_text("[]")
    lab.sign_bundle()


@attack("_bundle_settings", "bundle", "tokenizer_config.json is not JSON")
def tokenizer_config_names_a_key_twice(lab: Lab) -> None:
    (lab.bundle / "tokenizer_config.json").write_text('{"eos_token": "a", "eos_token": "b"}')
    lab.sign_bundle()


@attack("_bundle_settings", "bundle", "generation_config.json: key 'custom_generate' is not permitted")
def generation_asks_for_remote_code(lab: Lab) -> None:
    edit_json(lab.bundle / "generation_config.json", custom_generate="evil/repo")
    lab.sign_bundle()


@attack("_bundle_settings", "bundle", "special_tokens_map.json: key 'home' is not permitted")
def special_tokens_hold_something_else(lab: Lab) -> None:
    edit_json(lab.bundle / "special_tokens_map.json", home="/home/acme")
    lab.sign_bundle()


def _config(name: str, says: str, **changes: Any) -> None:
    def spoil(lab: Lab) -> None:
        edit_json(lab.bundle / "config.json", **changes)
        lab.sign_bundle()

    ATTACKS.append(Attack(name, "_bundle_config", "bundle", says, spoil))


_config("config_asks_for_remote_code", "key 'auto_map' is not permitted", auto_map={"AutoModelForCausalLM": "m.Evil"})
_config("config_asks_for_a_hub_kernel", "'_attn_implementation' is not", _attn_implementation="evil/kernel")
_config("config_asks_for_a_hub_kernel_in_the_new_spelling", "'attn_implementation' is", attn_implementation="a/b")
_config("config_names_other_weights", "'transformers_weights' is not permitted", transformers_weights="evil.bin")
_config("config_tells_a_path", "key '_name_or_path' is not permitted", _name_or_path="/home/acme/secret")
_config("config_nests_another_model", "key 'text_config' is not permitted", text_config={"model_type": "gpt2"})
_config("config_is_quantised_by_others", "key 'quantization_config' is", quantization_config={"quant_method": "gptq"})
_config("value_is_a_hub_name", "'hidden_act' holds 'evil/kernel'", hidden_act="evil/kernel")
_config("value_is_a_path_in_a_list", "'rope_parameters' holds", rope_parameters={"rope_type": "../x"})
_config("value_is_endless", "'rope_parameters' holds", rope_parameters={"other": [0] * 5000})
_config("another_model_type", "names the model", model_type="gpt2")
_config("another_class", "names the model", architectures=["LlamaForSequenceClassification"])
_config("no_model_type", "names the model", model_type=GONE)
_config("block_count_disagrees_with_the_split", "block counts", num_hidden_layers=4)
_config("block_count_is_missing", "block counts", num_hidden_layers=GONE)


def _parts(name: str, says: str, **changes: Any) -> None:
    def spoil(lab: Lab) -> None:
        edit_json(lab.bundle / "tokenizer.json", **changes)
        lab.sign_bundle()

    ATTACKS.append(Attack(name, "_bundle_tokenizer_parts", "bundle", says, spoil))


_parts(
    "a_regular_expression_without_end", "it repeats a group that can match in several ways",
    pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
)  # fmt: skip
_parts(
    "a_normalizer_that_makes_texts_longer", "normalizer.content has 400 characters, at most",
    normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 400},
)  # fmt: skip
_parts("a_part_that_nobody_knows", "has the type 'Script', which is not permitted", decoder={"type": "Script"})
_parts("an_added_token_beyond_all", "added_tokens has", added_tokens=[{"id": 2**40, "content": "x"}])


def _value(name: str, says: str, **changes: Any) -> None:
    def spoil(lab: Lab) -> None:
        edit_json(lab.bundle / "config.json", **changes)
        lab.sign_bundle()

    ATTACKS.append(Attack(name, "_bundle_values", "bundle", says, spoil))


_value(
    "tables_of_millions_of_positions",
    "max_position_embeddings = '8000000', expected",
    max_position_embeddings=8_000_000,
)
_value("more_is_dropped_than_there_is", "attention_dropout = '2', expected a number from 0", attention_dropout=2)
_value("a_negative_epsilon", "rms_norm_eps = '-0.5', expected a number above 0", rms_norm_eps=-0.5)
_value("a_count_that_is_a_text", "num_key_value_heads = '2', expected a whole number", num_key_value_heads="2")
_value("an_epsilon_that_is_true", "rms_norm_eps = 'True', expected a number above 0", rms_norm_eps=True)
_value("positions_of_another_kind", "rope_parameters.rope_theta = 'False'", rope_parameters={"rope_theta": False})


@attack("_bundle_config", "gpt2-bundle", "scale_attn_by_inverse_layer_idx = 'True', under which blocks cannot be cut")
def blocks_that_compute_by_their_place(lab: Lab) -> None:
    edit_json(lab.folder / "gpt2-bundle" / "config.json", scale_attn_by_inverse_layer_idx=True)
    sign_again(lab.folder / "gpt2-bundle", lab.owner)


@attack("_bundle_config", "gpt2-bundle", "block counts")
def two_spellings_of_the_block_count_disagree(lab: Lab) -> None:
    edit_json(lab.folder / "gpt2-bundle" / "config.json", num_hidden_layers=4)
    sign_again(lab.folder / "gpt2-bundle", lab.owner)


@attack("_bundle_config", "qwen2-bundle", "expected one entry for each of 3 blocks")
def a_list_with_an_entry_too_few(lab: Lab) -> None:
    edit_json(lab.folder / "qwen2-bundle" / "config.json", layer_types=["full_attention"] * 2)
    sign_again(lab.folder / "qwen2-bundle", lab.owner)


@attack("_bundle_config", "qwen2-bundle", "layer_types = None")
def no_list_so_that_windows_go_by_place(lab: Lab) -> None:
    edit_json(lab.folder / "qwen2-bundle" / "config.json", layer_types=None)
    sign_again(lab.folder / "qwen2-bundle", lab.owner)


def _mixture(name: str, rule: str, says: str, **changes: Any) -> None:
    def spoil(lab: Lab) -> None:
        edit_json(lab.folder / "mixture-bundle" / "config.json", **changes)
        sign_again(lab.folder / "mixture-bundle", lab.owner)

    ATTACKS.append(Attack(name, rule, "mixture-bundle", says, spoil))


_mixture(
    "dense_blocks_by_place", "_bundle_config", "decoder_sparse_step = '2', by which", decoder_sparse_step=2,
    mlp_only_layers=[],
)  # fmt: skip
_mixture(
    "no_list_of_dense_blocks", "_bundle_config", "mlp_only_layers = None, expected", decoder_sparse_step=2,
    mlp_only_layers=None,
)  # fmt: skip
_mixture("dense_blocks_out_of_range", "_bundle_config", "expected a list of some of 3", mlp_only_layers=[0, 2, 7])
_mixture("dense_blocks_out_of_order", "_bundle_config", "expected a list of some of 3", mlp_only_layers=[2, 0])
_mixture("another_number_of_experts", "_bundle_weights", "missing 'model.layers.1.mlp.experts.4.", num_local_experts=5)
_mixture("more_experts_than_tensors", "_bundle_weights", "the config makes it over", num_local_experts=1000)
_mixture("endless_experts", "_bundle_weights", "expected one number from 1 to 1024", num_local_experts=5000)
_mixture("more_chosen_than_there_are", "_bundle_weights", "num_experts_per_tok = 5, expected", num_experts_per_tok=5)
_mixture("two_numbers_of_experts", "_bundle_weights", "expected one number from 1 to 1024", num_experts=8)
_mixture(
    "blocks_without_experts", "_bundle_weights", "unexpected 'model.layers.1.mlp.experts.0", mlp_only_layers=[0, 1, 2]
)


@attack("_bundle_weights", "mixture-bundle", "missing 'model.layers.1.mlp.experts.3.up_proj.weight'")
def an_expert_without_a_matrix(lab: Lab) -> None:
    folder = lab.folder / "mixture-bundle"
    edit_bundle_weights(folder, lambda w: void(w.pop("model.layers.1.mlp.experts.3.up_proj.weight")))
    sign_again(folder, lab.owner)


@attack("_bundle_weights", "mixture-bundle", "has shape [32, 21], others of its kind have [32, 20]")
def an_expert_of_another_width_where_the_config_says_none(lab: Lab) -> None:
    def wider(weights: dict[str, Any]) -> None:
        weights["model.layers.1.mlp.experts.3.down_proj.weight"] = np.zeros((32, 21), np.float32)

    folder = lab.folder / "mixture-bundle"
    edit_json(folder / "config.json", moe_intermediate_size=GONE)
    edit_bundle_weights(folder, wider)
    sign_again(folder, lab.owner)


@attack("_bundle_weights", "mixture-bundle", "unexpected 'model.layers.1.mlp.experts.gate_up_proj'")
def experts_stacked_beside_the_others(lab: Lab) -> None:
    folder, stack = lab.folder / "mixture-bundle", np.zeros((4, 40, 32), np.float32)
    edit_bundle_weights(folder, lambda w: w.update({"model.layers.1.mlp.experts.gate_up_proj": stack}))
    sign_again(folder, lab.owner)


# --- modules that the emulator declares ---


@attack("_bundle_declared", "declared-bundle", "the manifest requires ['quantise', 'svd']")
def feature_required_that_is_not_declared(lab: Lab) -> None:
    sign_again(lab.folder / "declared-bundle", lab.owner, requires=["quantise", "svd"])


@attack("_bundle_declared", "declared-bundle", "the manifest requires []")
def declared_behind_a_manifest_that_says_plain(lab: Lab) -> None:
    sign_again(lab.folder / "declared-bundle", lab.owner, requires=[])


@attack("_bundle_declared", "spread-bundle", "the manifest requires []")
def spread_that_an_older_version_would_take_for_frozen(lab: Lab) -> None:
    sign_again(lab.folder / "spread-bundle", lab.owner, requires=[])


@attack("_bundle_returnable", "spread-bundle", "tensors that may come back")
def trained_block_of_which_nothing_may_come_back(lab: Lab) -> None:
    tensors = manifest_of(lab.folder / "spread-bundle")["tensors"]
    left = {name: entry for name, entry in tensors.items() if ".layers.2." not in name}
    sign_again(lab.folder / "spread-bundle", lab.owner, tensors=left)


@attack("_bundle_declared", "declared-bundle", "name of the other kind of model")
def declared_weights_that_transformers_would_half_load(lab: Lab) -> None:
    folder = lab.folder / "declared-bundle"
    (folder / DECLARED_WEIGHTS).rename(folder / WEIGHTS)
    sign_again(folder, lab.owner)


@attack("_bundle_weights", "declared-bundle", "what is declared makes it")
def factor_of_another_rank_than_declared(lab: Lab) -> None:
    def thinner(weights: dict[str, Any]) -> None:
        name = "model.layers.1.self_attn.q_proj.down"
        weights[name] = np.ascontiguousarray(weights[name][:-1])

    edit_weights(lab.folder / "declared-bundle" / DECLARED_WEIGHTS, thinner)
    sign_again(lab.folder / "declared-bundle", lab.owner)


def declare_more(lab: Lab, **fields: Any) -> None:
    """Declare further kinds of modules in the declared bundle's config, and in its manifest."""
    folder = lab.folder / "declared-bundle"
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", emulator=config["emulator"] | fields)
    sign_again(folder, lab.owner, requires=["svd", "affine", *fields])


@attack("_bundle_weights", "declared-bundle", "heads go by 2")
def heads_that_are_no_whole_key_value_heads(lab: Lab) -> None:
    declare_more(lab, heads=[3])


@attack("_bundle_weights", "declared-bundle", "has 8 heads and 48 neurons, of 4 and 48")
def more_heads_than_the_family_has(lab: Lab) -> None:
    declare_more(lab, heads=[8])


@attack("_bundle_weights", "declared-bundle", "what is declared makes it F32 or BF16 or F16 [16, 47]")
def fewer_neurons_than_the_weights_have(lab: Lab) -> None:
    declare_more(lab, neurons=[47])


@attack("_bundle_declared", "declared-bundle", "declares experts for blocks from which none can be removed")
def experts_of_blocks_that_have_none(lab: Lab) -> None:
    declare_more(lab, experts=[0])


@attack("_bundle_weights", "narrow-mixture-bundle", "has 1 experts, expected 2, through which a token goes, to 4")
def fewer_experts_than_a_token_goes_through(lab: Lab) -> None:
    edit_emulator(lab, "narrow-mixture-bundle", experts=[1])


@attack("_bundle_weights", "narrow-mixture-bundle", "has 5 experts, expected 2, through which a token goes, to 4")
def more_experts_than_the_family_has(lab: Lab) -> None:
    edit_emulator(lab, "narrow-mixture-bundle", experts=[5])


@attack("_bundle_weights", "narrow-mixture-bundle", "unexpected 'model.layers.1.mlp.experts.2.down_proj.weight'")
def fewer_experts_than_the_weights_have(lab: Lab) -> None:
    edit_emulator(lab, "narrow-mixture-bundle", experts=[2])


@attack("_bundle_weights", "narrow-mixture-bundle", "what is declared makes it F32 or BF16 or F16 [3, 32]")
def router_with_a_row_for_a_removed_expert(lab: Lab) -> None:
    def wider(weights: dict[str, Any]) -> None:
        weights["model.layers.1.mlp.gate.weight"] = np.zeros((4, 32), np.float32)

    edit_weights(lab.folder / "narrow-mixture-bundle" / DECLARED_WEIGHTS, wider)
    sign_again(lab.folder / "narrow-mixture-bundle", lab.owner)


@attack("_bundle_family_shapes", "narrow-mixture-bundle", "the config makes it [4, 32]")
def family_shapes_of_another_number_of_experts(lab: Lab) -> None:
    config = json.loads((lab.folder / "narrow-mixture-bundle" / CONFIG).read_text())
    shapes = config["emulator"]["shapes"] | {"mlp.gate.weight": [7, 32]}
    edit_emulator(lab, "narrow-mixture-bundle", shapes=shapes)


@attack("_bundle_weights", "declared-bundle", "model.layers.1.self_attn.q_proj.up")
def factor_left_out(lab: Lab) -> None:
    edit_weights(
        lab.folder / "declared-bundle" / DECLARED_WEIGHTS,
        lambda weights: void(weights.pop("model.layers.1.self_attn.q_proj.up")),
    )
    sign_again(lab.folder / "declared-bundle", lab.owner)


@attack("_bundle_weights", "declared-bundle", "what is declared makes it F32 or BF16 or F16 [32, 32]")
def map_behind_a_block_of_another_shape(lab: Lab) -> None:
    def thinner(weights: dict[str, Any]) -> None:
        name = "model.layers.1.affine.weight"
        weights[name] = np.ascontiguousarray(weights[name][:-1])

    edit_weights(lab.folder / "declared-bundle" / DECLARED_WEIGHTS, thinner)
    sign_again(lab.folder / "declared-bundle", lab.owner)


@attack("_bundle_declared", "every-bundle", "the manifest requires ['quantise', 'mlp-width']")
def adapted_blocks_that_an_older_version_would_take_for_frozen(lab: Lab) -> None:
    sign_again(lab.folder / "every-bundle", lab.owner, requires=["quantise", "mlp-width"])


def edit_emulator(lab: Lab, bundle: str, **changes: Any) -> None:
    folder = lab.folder / bundle
    edit_json(folder / CONFIG, emulator=json.loads((folder / CONFIG).read_text())["emulator"] | changes)
    sign_again(folder, lab.owner)


def family_shapes(lab: Lab) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((lab.folder / "every-bundle" / CONFIG).read_text())["emulator"]["shapes"]
    return found


@attack("_bundle_family_shapes", "declared-bundle", "which only a bundle without a block of the family has")
def family_shapes_beside_blocks_of_the_family(lab: Lab) -> None:
    edit_emulator(lab, "declared-bundle", shapes=family_shapes(lab))


@attack("_bundle_returnable", "every-bundle", "mlp.up_proj: the weight's shape is (24, 32), expected (48, 32)")
def lora_target_of_the_bases_shape_on_a_narrow_layer(lab: Lab) -> None:
    targets = manifest_of(lab.folder / "every-bundle")["lora_targets"]
    targets["model.layers.0.mlp.up_proj"] = [32, 48]
    sign_again(lab.folder / "every-bundle", lab.owner, lora_targets=targets)


@attack("_bundle_returnable", "every-gpt2-bundle", "tensors that may come back: missing")
def bias_of_an_adapted_block_not_permitted_back(lab: Lab) -> None:
    tensors = manifest_of(lab.folder / "every-gpt2-bundle")["tensors"]
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    sign_again(lab.folder / "every-gpt2-bundle", lab.owner, tensors=tensors)


@attack("_bundle_returnable", "gpt2-bundle", "the weight's shape is")
def lora_target_the_wrong_way_round(lab: Lab) -> None:
    targets = manifest_of(lab.folder / "gpt2-bundle")["lora_targets"]
    targets["transformer.h.0.attn.c_attn"].reverse()
    sign_again(lab.folder / "gpt2-bundle", lab.owner, lora_targets=targets)


@attack("_bundle_weights", "bundle", "unexpected 'lm_head.weight'")
def tied_head_smuggled_in(lab: Lab) -> None:
    edit_bundle_weights(lab.bundle, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] * 2}))
    lab.sign_bundle()


@attack("_bundle_weights", "bundle", "unexpected 'secret'")
def tensor_beside_the_model(lab: Lab) -> None:
    edit_bundle_weights(lab.bundle, lambda w: w.update(secret=np.zeros(3, np.float32)))
    lab.sign_bundle()


@attack("_bundle_weights", "bundle", "unexpected 'model.layers.1.evil.weight'")
def tensor_beside_a_block(lab: Lab) -> None:
    edit_bundle_weights(lab.bundle, lambda w: w.update({"model.layers.1.evil.weight": np.zeros(3, np.float32)}))
    lab.sign_bundle()


@attack("_bundle_weights", "bundle", "missing 'model.norm.weight'")
def tensor_left_out_so_that_it_is_random(lab: Lab) -> None:
    edit_bundle_weights(lab.bundle, lambda w: void(w.pop("model.norm.weight")))
    lab.sign_bundle()


@attack("_bundle_weights", "bundle", "missing 'model.layers.0.self_attn.k_proj.bias'")
def biases_announced_but_not_there(lab: Lab) -> None:
    edit_json(lab.bundle / "config.json", attention_bias=True)
    lab.sign_bundle()


@attack("_bundle_weights", "bundle", "missing 'lm_head.weight'")
def untied_without_a_head(lab: Lab) -> None:
    edit_json(lab.bundle / "config.json", tie_word_embeddings=False)
    lab.sign_bundle()


@attack("_bundle_weights", "bundle", "has shape [300, 32], the config makes it [320, 32]")
def embedding_shorter_than_the_vocabulary(lab: Lab) -> None:
    def shorter(weights: dict[str, Any]) -> None:
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:300]

    edit_bundle_weights(lab.bundle, shorter)
    lab.sign_bundle()


@attack("_bundle_weights", "bundle", "the config makes it [1000000, 32]")
def config_that_asks_for_all_memory(lab: Lab) -> None:
    edit_json(lab.bundle / "config.json", intermediate_size=1_000_000)
    lab.sign_bundle()


@attack("_bundle_weights", "gpt2-bundle", "others of its kind have")
def emulator_block_of_another_width(lab: Lab) -> None:
    def wider(weights: dict[str, Any]) -> None:
        weights["transformer.h.1.mlp.c_fc.bias"] = np.zeros(64, np.float32)

    edit_bundle_weights(lab.folder / "gpt2-bundle", wider)
    sign_again(lab.folder / "gpt2-bundle", lab.owner)


@attack("_bundle_weights", "bundle", "the config makes it [48, 32]")
def emulator_block_of_another_shape(lab: Lab) -> None:
    def wider(weights: dict[str, Any]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)

    edit_bundle_weights(lab.bundle, wider)
    lab.sign_bundle()


@attack("_bundle_weights", "bundle", "has dtype I32")
def weights_that_are_no_floats(lab: Lab) -> None:
    file = lab.bundle / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "I32"
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
    lab.sign_bundle()


@attack("_bundle_returnable", "bundle", "tensors that may come back: missing")
def trained_tensor_not_permitted_back(lab: Lab) -> None:
    tensors = manifest_of(lab.bundle)["tensors"]
    del tensors["model.layers.0.mlp.up_proj.weight"]
    lab.sign_bundle(tensors=tensors)


@attack("_bundle_returnable", "bundle", "tensors that may come back: unexpected")
def tensor_that_is_not_there_permitted_back(lab: Lab) -> None:
    tensors = manifest_of(lab.bundle)["tensors"]
    tensors["model.layers.0.evil.weight"] = {"shape": [1], "dtype": "F32"}
    lab.sign_bundle(tensors=tensors)


@attack("_bundle_returnable", "bundle", "is F32 [48, 32] in the file, F32 [48, 33] in")
def permitted_shape_is_not_the_files(lab: Lab) -> None:
    tensors = manifest_of(lab.bundle)["tensors"]
    tensors["model.layers.0.mlp.up_proj.weight"]["shape"] = [48, 33]
    lab.sign_bundle(tensors=tensors)


@attack("_bundle_returnable", "bundle", "in the file, BF16")
def permitted_dtype_is_not_the_files(lab: Lab) -> None:
    tensors = manifest_of(lab.bundle)["tensors"]
    tensors["model.layers.0.mlp.up_proj.weight"]["dtype"] = "BF16"
    lab.sign_bundle(tensors=tensors)


@attack("_bundle_returnable", "bundle", "LoRA target model.layers.0.mlp.up_proj: the weight's shape is")
def lora_target_of_another_shape(lab: Lab) -> None:
    targets = manifest_of(lab.bundle)["lora_targets"]
    targets["model.layers.0.mlp.up_proj"] = [48, 32]
    lab.sign_bundle(lora_targets=targets)


@attack("_bundle_returnable", "bundle", "the head that may come back: unexpected 'lm_head.weight'")
def embedding_asked_for_as_a_tied_head(lab: Lab) -> None:
    lab.sign_bundle(head={"lm_head.weight": {"shape": [320, 32], "dtype": "F32"}})


@attack("_bundle_returnable", "head-bundle", "lm_head.weight is F32 [320, 32] in the file, F32 [640, 32] in")
def head_asked_for_with_more_rows_than_it_has(lab: Lab) -> None:
    head = {"lm_head.weight": {"shape": [640, 32], "dtype": "F32"}}
    sign_again(lab.folder / "head-bundle", lab.owner, head=head)


@attack("_bundle_tokenizer", "bundle", "do not give the tokenizer digest")
def tokenizer_digest_of_another_tokenizer(lab: Lab) -> None:
    lab.sign_bundle(tokenizer="0" * 64)


# --- returns ---


@attack("_return_lora", "every-lora", "transformer.h.1.mlp.c_fc.lora_B.weight")
def adapter_of_the_bases_shape_on_a_narrow_layer(lab: Lab) -> None:
    name = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"
    wide = np.zeros((128, 4), np.float32)
    edit_weights(lab.folder / "every-lora" / ADAPTER_WEIGHTS, lambda weights: weights.update({name: wide}))
    tensors = manifest_of(lab.folder / "every-lora")["tensors"] | {name: {"shape": [128, 4], "dtype": "F32"}}
    sign_again(lab.folder / "every-lora", lab.data_owner, tensors=tensors)


@attack("_return_own", "every-bitfit", "transformer.h.1.mlp.c_fc.bias")
def bias_of_the_bases_length_on_a_narrow_layer(lab: Lab) -> None:
    name = "transformer.h.1.mlp.c_fc.bias"
    wide = np.zeros(128, np.float32)
    edit_weights(lab.folder / "every-bitfit" / RETURNED_WEIGHTS, lambda weights: weights.update({name: wide}))
    tensors = manifest_of(lab.folder / "every-bitfit")["tensors"] | {name: {"shape": [128], "dtype": "F32"}}
    sign_again(lab.folder / "every-bitfit", lab.data_owner, tensors=tensors)


@attack("_return_files", "lora", "files: unexpected 'trainer_state.json'")
def return_tells_more_than_weights(lab: Lab) -> None:
    (lab.lora / "trainer_state.json").write_text('{"rows": 12}')
    lab.sign_lora()


@attack("_return_files", "full", "files: unexpected 'adapter_config.json'")
def full_return_that_peft_would_load(lab: Lab) -> None:
    (lab.full / ADAPTER_CONFIG).write_text("{}")
    lab.sign_full()


@attack("_return_files", "checkpoints", "files: unexpected 'checkpoint-3.safetensors'")
def more_checkpoints_than_announced(lab: Lab) -> None:
    folder = lab.folder / "checkpoints"
    shutil.copy(folder / checkpoint_file(2), folder / checkpoint_file(3))
    sign_again(folder, lab.data_owner)


@attack("_return_files", "checkpoints", "files: missing 'checkpoint-2.safetensors'")
def fewer_checkpoints_than_announced(lab: Lab) -> None:
    (lab.folder / "checkpoints" / checkpoint_file(2)).unlink()
    sign_again(lab.folder / "checkpoints", lab.data_owner)


@attack("_return_files", "lora", "files: unexpected 'checkpoint-1.safetensors'")
def checkpoint_beside_a_return_that_announces_none(lab: Lab) -> None:
    shutil.copy(lab.lora / ADAPTER_WEIGHTS, lab.lora / checkpoint_file(1))
    lab.sign_lora()


@attack("_return_tensors", "checkpoints", "tensors in checkpoint-1.safetensors: unexpected 'rows'")
def tensor_beside_an_earlier_checkpoint(lab: Lab) -> None:
    folder = lab.folder / "checkpoints"
    edit_weights(folder / checkpoint_file(1), lambda w: w.update(rows=np.zeros(3, np.float32)))
    sign_again(folder, lab.data_owner)


@attack("_return_tensors", "checkpoints", "tensors in checkpoint-2.safetensors: missing")
def tensor_of_an_earlier_checkpoint_left_out(lab: Lab) -> None:
    folder = lab.folder / "checkpoints"
    edit_weights(folder / checkpoint_file(2), lambda w: void(w.pop(next(iter(w)))))
    sign_again(folder, lab.data_owner)


@attack("_return_tensors", "checkpoints", "in checkpoint-1.safetensors, F32 [")
def earlier_checkpoint_of_another_shape(lab: Lab) -> None:
    def longer(weights: dict[str, Any]) -> None:
        name = next(iter(weights))
        weights[name] = np.zeros((9, *weights[name].shape[1:]), np.float32)

    edit_weights(lab.folder / "checkpoints" / checkpoint_file(1), longer)
    sign_again(lab.folder / "checkpoints", lab.data_owner)


@attack("_return_tensors", "checkpoints", "has dtype F16 in checkpoint-1.safetensors, expected F32")
def earlier_checkpoint_of_another_dtype(lab: Lab) -> None:
    file = lab.folder / "checkpoints" / checkpoint_file(1)
    edit_weights(file, lambda w: None, dict.fromkeys(read_header(file), "F16"))
    sign_again(lab.folder / "checkpoints", lab.data_owner)


@attack("_return_tensors", "lora", "tensors in the file: unexpected 'rows'")
def tensor_beside_the_adapter(lab: Lab) -> None:
    edit_weights(lab.lora / ADAPTER_WEIGHTS, lambda w: w.update(rows=np.zeros(3, np.float32)))
    lab.sign_lora()


@attack("_return_tensors", "lora", "tensors in the file: missing")
def tensor_of_the_adapter_left_out(lab: Lab) -> None:
    edit_weights(lab.lora / ADAPTER_WEIGHTS, lambda w: void(w.pop(next(iter(w)))))
    lab.sign_lora()


@attack("_return_tensors", "full", "in the file, F32 [32] in")
def returned_shape_is_not_the_manifests(lab: Lab) -> None:
    def shorter(weights: dict[str, Any]) -> None:
        name = "model.layers.0.input_layernorm.weight"
        weights[name] = weights[name][:31]

    edit_weights(lab.full / RETURNED_WEIGHTS, shorter)
    lab.sign_full()


@attack("_return_tensors", "full", "has dtype BF16 in the file, expected F32")
def returned_dtype_is_not_the_manifests(lab: Lab) -> None:
    name = "model.layers.0.input_layernorm.weight"
    edit_weights(lab.full / RETURNED_WEIGHTS, lambda w: None, {name: "BF16"})
    lab.sign_full()


def _not_finite(name: str, target: str, file: str, value: float) -> None:
    def spoil(lab: Lab) -> None:
        def poison(weights: dict[str, Any]) -> None:
            list(weights.values())[-1].flat[-1] = value

        edit_weights(lab.folder / target / file, poison)
        sign_again(lab.folder / target, lab.data_owner)

    ATTACKS.append(Attack(name, "_return_finite", target, "holds NaN or infinity", spoil))


_not_finite("nan_in_a_lora_return", "lora", ADAPTER_WEIGHTS, float("nan"))
_not_finite("infinity_in_a_lora_return", "lora", ADAPTER_WEIGHTS, float("-inf"))
_not_finite("nan_in_an_earlier_checkpoint", "checkpoints", "checkpoint-1.safetensors", float("nan"))
_not_finite("infinity_in_an_earlier_checkpoint", "checkpoints", "checkpoint-2.safetensors", float("inf"))
_not_finite("nan_in_a_full_return", "full", RETURNED_WEIGHTS, float("nan"))
_not_finite("infinity_in_a_full_return", "full", RETURNED_WEIGHTS, float("inf"))


def _adapter_config(name: str, **changes: Any) -> None:
    def spoil(lab: Lab) -> None:
        edit_json(lab.lora / ADAPTER_CONFIG, **changes)
        lab.sign_lora()

    ATTACKS.append(Attack(name, "_return_lora", "lora", "is not the one that these LoRA settings give", spoil))


_adapter_config("adapter_widened_to_every_block", target_modules=["q_proj", "v_proj"])
_adapter_config("adapter_on_all_linear_maps", target_modules="all-linear")
_adapter_config("adapter_that_changes_base_weights_at_load", init_lora_weights="pissa")
_adapter_config("adapter_that_names_a_base", base_model_name_or_path="evil/repo")
_adapter_config("adapter_that_saves_modules", modules_to_save=["lm_head"])
_adapter_config("adapter_of_another_scale", lora_alpha=800.0)
_adapter_config("adapter_of_another_kind", peft_type="PROMPT_TUNING")
_adapter_config("adapter_with_code", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})
_adapter_config("adapter_with_patterns", rank_pattern={".*": 64})


def _moved(lab: Lab, change: Callable[[str], str]) -> None:
    """Rename every LoRA target of a block, in the manifest, the weights and the config alike."""
    old = manifest_of(lab.lora)
    text = json.dumps({"lora": old["lora"], "tensors": old["tensors"]})
    new = json.loads(change(text))
    edit_weights(lab.lora / ADAPTER_WEIGHTS, lambda w: _rename(w, change))
    config = lab.lora / ADAPTER_CONFIG
    content = json.loads(change(config.read_text()))
    config.write_bytes(json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
    lab.sign_lora(**new)


def _rename(weights: dict[str, Any], change: Callable[[str], str]) -> None:
    renamed = {change(name): value for name, value in weights.items()}
    weights.clear()
    weights.update(renamed)


@attack("_return_lora", "lora", "LoRA sits on model.layers.1.mlp.up_proj, which the bundle does not permit")
def lora_on_a_frozen_block(lab: Lab) -> None:
    _moved(lab, lambda text: text.replace("model.layers.0.", "model.layers.1."))


@attack("_return_lora", "lora", "LoRA sits on model.layers.7.mlp.up_proj")
def lora_on_a_block_that_is_not_there(lab: Lab) -> None:
    _moved(lab, lambda text: text.replace("model.layers.2.", "model.layers.7."))


@attack("_return_lora", "lora", "LoRA sits on model.layers.0.mlp.down_proj.x")
def lora_on_a_module_that_is_not_there(lab: Lab) -> None:
    _moved(lab, lambda text: text.replace("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj.x"))


@attack("_return_lora", "lora", "a LoRA target is named twice")
def lora_target_named_twice(lab: Lab) -> None:
    lora = manifest_of(lab.lora)["lora"]
    lora["targets"] = [*lora["targets"], lora["targets"][0]]
    edit_json(lab.lora / ADAPTER_CONFIG, target_modules=sorted(lora["targets"]))
    content = json.loads((lab.lora / ADAPTER_CONFIG).read_text())
    (lab.lora / ADAPTER_CONFIG).write_bytes(json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
    lab.sign_lora(lora=lora)


@attack("_return_lora", "lora", "is F32 [5, 32], expected F32 [4, 32]")
def lora_pair_of_another_rank_than_the_settings(lab: Lab) -> None:
    tensors = manifest_of(lab.lora)["tensors"]
    name = next(name for name in tensors if name.endswith("model.layers.0.self_attn.q_proj.lora_A.weight"))
    tensors[name]["shape"] = [5, 32]

    def grow(weights: dict[str, Any]) -> None:
        weights[name] = np.zeros((5, 32), np.float32)

    edit_weights(lab.lora / ADAPTER_WEIGHTS, grow)
    lab.sign_lora(tensors=tensors)


@attack("_return_own", "full", "tensors: missing 'model.layers.0.input_layernorm.weight'")
def full_return_without_a_tensor(lab: Lab) -> None:
    name = "model.layers.0.input_layernorm.weight"
    tensors = manifest_of(lab.full)["tensors"]
    del tensors[name]
    edit_weights(lab.full / RETURNED_WEIGHTS, lambda w: void(w.pop(name)))
    lab.sign_full(tensors=tensors)


@attack("_return_own", "full", "tensors: unexpected 'model.layers.1.input_layernorm.weight'")
def full_return_with_a_frozen_tensor(lab: Lab) -> None:
    name = "model.layers.1.input_layernorm.weight"
    tensors = manifest_of(lab.full)["tensors"] | {name: {"shape": [32], "dtype": "F32"}}
    edit_weights(lab.full / RETURNED_WEIGHTS, lambda w: w.update({name: np.ones(32, np.float32)}))
    lab.sign_full(tensors=tensors)


@attack("_return_own", "full", "tensors: unexpected 'model.embed_tokens.weight'")
def full_return_with_the_embedding(lab: Lab) -> None:
    name = "model.embed_tokens.weight"
    tensors = manifest_of(lab.full)["tensors"] | {name: {"shape": [320, 32], "dtype": "F32"}}
    edit_weights(lab.full / RETURNED_WEIGHTS, lambda w: w.update({name: np.ones((320, 32), np.float32)}))
    lab.sign_full(tensors=tensors)


@attack("_return_own", "full", "is F32 [31], expected F32 [32]")
def full_return_of_another_shape(lab: Lab) -> None:
    name = "model.layers.0.input_layernorm.weight"
    tensors = manifest_of(lab.full)["tensors"]
    tensors[name]["shape"] = [31]

    def shorter(weights: dict[str, Any]) -> None:
        weights[name] = weights[name][:31]

    edit_weights(lab.full / RETURNED_WEIGHTS, shorter)
    lab.sign_full(tensors=tensors)


@attack("_return_own", "bitfit", "tensors: unexpected 'transformer.h.0.ln_1.weight'")
def bitfit_return_with_a_norms_weight(lab: Lab) -> None:
    """Of one dimension like a bias, and permitted to a full return."""
    name, folder = "transformer.h.0.ln_1.weight", lab.folder / "bitfit"
    tensors = manifest_of(folder)["tensors"] | {name: {"shape": [32], "dtype": "F32"}}
    edit_weights(folder / RETURNED_WEIGHTS, lambda w: w.update({name: np.ones(32, np.float32)}))
    sign_again(folder, lab.data_owner, tensors=tensors)


@attack("_return_own", "bitfit", "tensors: missing 'transformer.h.2.mlp.c_proj.bias'")
def bitfit_return_without_a_bias(lab: Lab) -> None:
    name, folder = "transformer.h.2.mlp.c_proj.bias", lab.folder / "bitfit"
    tensors = manifest_of(folder)["tensors"]
    del tensors[name]
    edit_weights(folder / RETURNED_WEIGHTS, lambda w: void(w.pop(name)))
    sign_again(folder, lab.data_owner, tensors=tensors)


@attack("_return_own", "head-full", "tensors: missing 'lm_head.weight'")
def full_return_that_keeps_the_head_it_announces(lab: Lab) -> None:
    folder = lab.folder / "head-full"
    tensors = manifest_of(folder)["tensors"]
    del tensors["lm_head.weight"]
    edit_weights(folder / RETURNED_WEIGHTS, lambda w: void(w.pop("lm_head.weight")))
    sign_again(folder, lab.data_owner, tensors=tensors)


@attack("_return_own", "head-full", "tensors: unexpected 'lm_head.weight'")
def full_return_with_a_head_that_it_does_not_announce(lab: Lab) -> None:
    sign_again(lab.folder / "head-full", lab.data_owner, head=False)


@attack("_return_lora", "head-lora", "base_model.model.lm_head.weight is F32 [319, 32], expected F32 [320, 32]")
def head_of_a_smaller_vocabulary_beside_the_adapter(lab: Lab) -> None:
    folder, name = lab.folder / "head-lora", "base_model.model.lm_head.weight"
    tensors = manifest_of(folder)["tensors"]
    tensors[name]["shape"] = [319, 32]

    def shorter(weights: dict[str, Any]) -> None:
        weights[name] = weights[name][:319]

    edit_weights(folder / ADAPTER_WEIGHTS, shorter)
    sign_again(folder, lab.data_owner, tensors=tensors)


@attack("_return_lora", "head-lora", "adapter_config.json is not the one")
def adapter_that_saves_the_embedding_too(lab: Lab) -> None:
    folder = lab.folder / "head-lora"
    edit_json(folder / ADAPTER_CONFIG, modules_to_save=["lm_head", "embed_tokens"])
    sign_again(folder, lab.data_owner)


@attack("_return_head", "full", "the head was tuned, which the bundle does not permit")
def head_announced_where_none_is_permitted(lab: Lab) -> None:
    lab.sign_full(head=True)


@attack("_return_bottleneck", "bottleneck", "tensors: unexpected 'model.layers.1.mlp.down_proj.bottleneck")
def bottleneck_in_a_frozen_block(lab: Lab) -> None:
    def moved(name: str) -> str:
        return name.replace("model.layers.0.", "model.layers.1.")

    folder = lab.folder / "bottleneck"
    tensors = {moved(name): entry for name, entry in manifest_of(folder)["tensors"].items()}
    edit_weights(folder / BOTTLENECK_WEIGHTS, lambda w: _rename(w, moved))
    sign_again(folder, lab.data_owner, tensors=tensors)


@attack("_return_bottleneck", "bottleneck", "is F32 [9, 32], expected F32 [4, 32]")
def bottleneck_wider_than_its_settings(lab: Lab) -> None:
    name, folder = "model.layers.0.mlp.down_proj.bottleneck.down.weight", lab.folder / "bottleneck"
    tensors = manifest_of(folder)["tensors"]
    tensors[name]["shape"] = [9, 32]
    edit_weights(folder / BOTTLENECK_WEIGHTS, lambda w: w.update({name: np.zeros((9, 32), np.float32)}))
    sign_again(folder, lab.data_owner, tensors=tensors)


@attack("_return_bottleneck", "bottleneck", "tensors: unexpected 'model.layers.0.mlp.down_proj.weight'")
def bottleneck_return_with_a_weight_of_the_block(lab: Lab) -> None:
    name, folder = "model.layers.0.mlp.down_proj.weight", lab.folder / "bottleneck"
    tensors = manifest_of(folder)["tensors"] | {name: {"shape": [32, 48], "dtype": "F32"}}
    edit_weights(folder / BOTTLENECK_WEIGHTS, lambda w: w.update({name: np.zeros((32, 48), np.float32)}))
    sign_again(folder, lab.data_owner, tensors=tensors)


@attack("_bundle_settings", "encoder-bundle", "auto_map")
def image_processor_of_the_owners_own_code(lab: Lab) -> None:
    edit_json(lab.folder / "encoder-bundle" / PROCESSOR, auto_map={"AutoImageProcessor": "evil.Processor"})
    sign_again(lab.folder / "encoder-bundle", lab.owner)


@attack("_bundle_settings", "encoder-bundle", "size = ")
def image_processor_that_makes_images_of_terabytes(lab: Lab) -> None:
    edit_json(lab.folder / "encoder-bundle" / PROCESSOR, size={"height": 10**6, "width": 10**6})
    sign_again(lab.folder / "encoder-bundle", lab.owner)


@attack("_return_files", "encoder-full", "files: unexpected 'more.safetensors'")
def second_classifier_beside_the_first(lab: Lab) -> None:
    (lab.encoder_full / "more.safetensors").write_bytes((lab.encoder_full / CLASSIFIER).read_bytes())
    lab.sign_encoder_full()


@attack("_return_classifier", "encoder-full", "no classifier comes back")
def encoder_without_a_classifier(lab: Lab) -> None:
    (lab.encoder_full / CLASSIFIER).unlink()
    lab.sign_encoder_full(classes=None)


@attack("_return_classifier", "full", "a classifier comes back")
def classifier_for_a_language_model(lab: Lab) -> None:
    (lab.full / CLASSIFIER).write_bytes((lab.encoder_full / CLASSIFIER).read_bytes())
    lab.sign_full(classes=["cat", "dog"])


@attack("_return_classifier", "encoder-full", "is F32 [2, 64], expected F32 [3, 64]")
def classifier_with_fewer_outputs_than_classes(lab: Lab) -> None:
    lab.sign_encoder_full(classes=["cat", "dog", "horse"])


@attack("_return_classifier", "encoder-full", "is F32 [2, 63], expected F32 [2, 64]")
def classifier_of_another_encoder(lab: Lab) -> None:
    edit_weights(
        lab.encoder_full / CLASSIFIER, lambda w: w.update({"classifier.weight": w["classifier.weight"][:, :63]})
    )
    lab.sign_encoder_full()


@attack("_return_classifier", "encoder-full", "classifier: unexpected 'dinov2.layernorm.weight'")
def classifier_with_a_tensor_of_the_encoder(lab: Lab) -> None:
    edit_weights(lab.encoder_full / CLASSIFIER, lambda w: w.update({"dinov2.layernorm.weight": np.ones(2, np.float32)}))
    lab.sign_encoder_full()


@attack("_return_classifier", "encoder-full", "holds NaN or infinity")
def classifier_that_is_no_number(lab: Lab) -> None:
    edit_weights(lab.encoder_full / CLASSIFIER, lambda w: void(w["classifier.bias"].fill(np.nan)))
    lab.sign_encoder_full()


@attack("_return_parties", "lora", "signed by another party than the one that the bundle was issued to")
def return_signed_by_another_customer(lab: Lab) -> None:
    sign_again(lab.lora, lab.carol, signer=lab.carol.public_key.hex)


def void(_: object) -> None:
    """A lambda that pops must return None."""


def _of_timm(lab: Lab, **config: Any) -> None:
    folder = lab.folder / "timm-bundle"
    edit_json(folder / "config.json", **config)
    sign_again(folder, lab.owner)


def _arguments(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((lab.folder / "timm-bundle" / "config.json").read_text())["model_args"]
    return found


@attack("_bundle_config", "timm-bundle", "architecture = 'hf-hub:evil/model', expected one of eva02_base")
def function_of_timm_that_fetches_from_a_hub(lab: Lab) -> None:
    _of_timm(lab, architecture="hf-hub:evil/model")


@attack("_bundle_config", "timm-bundle", "architecture = 'vit_giant_patch14_dinov2', expected one of")
def function_of_timm_that_is_not_among_the_permitted(lab: Lab) -> None:
    _of_timm(lab, architecture="vit_giant_patch14_dinov2")


@attack("_bundle_config", "timm-bundle", "config has model_args = ")
def arguments_by_which_timm_reads_a_file(lab: Lab) -> None:
    _of_timm(lab, model_args={**_arguments(lab), "checkpoint_path": "weights.pth"})


@attack("_bundle_config", "timm-bundle", "config has model_args = ")
def arguments_by_which_timm_fetches_weights(lab: Lab) -> None:
    _of_timm(lab, model_args={**_arguments(lab), "pretrained": True})


@attack("_bundle_config", "timm-bundle", "config has model_args = ")
def arguments_by_which_timm_builds_a_huge_model(lab: Lab) -> None:
    _of_timm(lab, model_args={**_arguments(lab), "depth": 10**6})


@attack("_bundle_config", "timm-bundle", "config has model_args = ")
def no_arguments_so_that_timm_builds_the_published_size(lab: Lab) -> None:
    _of_timm(lab, model_args=None)


@attack("_bundle_config", "timm-bundle", "config key 'pretrained_cfg' is not permitted")
def published_settings_that_name_a_file_of_weights(lab: Lab) -> None:
    _of_timm(lab, pretrained_cfg={"file": "weights.pth"})


@attack("_bundle_returnable", "timm-bundle", "attn.qkv: pairs there have no effect")
def lora_where_timm_passes_it_by(lab: Lab) -> None:
    folder = lab.folder / "timm-bundle"
    targets = manifest_of(folder)["lora_targets"] | {"timm_model.blocks.0.attn.qkv": [32, 96]}
    sign_again(folder, lab.owner, lora_targets=targets)
