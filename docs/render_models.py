"""Writes docs/models.md from the table of families and the tests' kinds, so that it cannot drift: `make docs`."""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from offsite.models.families.architectures import ARCHITECTURES  # noqa: E402
from offsite.models.families.family import Architecture  # noqa: E402
from tiny import KINDS, VISION_KINDS  # noqa: E402

INTRODUCTION = """# Model families

<!-- Made by docs/render_models.py from src/offsite/models/families/language_families.py and
docs/results/model-types.json; run `make docs` after a change there. -->

`offsite pack` takes any causal decoder of the installed transformers. There are two ways:

| the model type | what happens |
|---|---|
| has a row in the table below (image encoders too) | both parties verify by that row |
| has none | the family is read off the model, proved on your weights, and declared in the signed manifest |

The rows are in [language_families.py](../src/offsite/models/families/language_families.py) and
[vision_families.py](../src/offsite/models/families/vision_families.py). The proof runs before anything is written, and
the data owner checks a declared family without torch
([how, and what that trusts](decisions/0008-declared-families.md)).

What cannot be proved is refused, and the error says what differs. Both ways need a model that transformers itself can
build: models with code of their own do not work. Both parties need a transformers that has the type.

"""

FAMILY_TABLE = """
## Families with a row

| model type | class in transformers | head tied | refit |
|---|---|---|---|
"""

TESTED = """
For every family, in every form listed below, tiny random models go through the tests: with all blocks kept the
bundle is the base bit for bit; with blocks dropped its logits are those of a truncated model; generation with a
cache equals that without; block by block equals transformers' hidden states; refit is the ridge solution; `pack` with
its defaults makes a bundle; both methods go through pack, verify, tune and plug-in; the adapter, the merged checkpoint
and the data owner's own view agree; an untouched return gives the base back bit for bit. These models are tiny and
random: they show that the right thing is computed, not that tuning on an emulator pays.

"""

POPULAR = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "opt", "phi3", "gpt_neox", "mixtral",
    "bloom", "falcon", "gptj", "gemma", "phi", "stablelm", "qwen2_moe", "qwen3_moe", "smollm3", "starcoder2",
    "gpt_oss", "qwen3_next", "qwen3_5_text", "llama4_text", "deepseek_v2", "deepseek_v3", "olmo", "olmo2",
    "olmo3", "olmoe", "granite", "granitemoe", "granitemoehybrid", "gpt_bigcode", "gpt_neo", "codegen", "cohere",
    "cohere2", "glm", "glm4", "glm4_moe", "mpt", "mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba",
    "rwkv", "recurrent_gemma", "nemotron", "seed_oss", "ernie4_5", "exaone4", "hunyuan_v1_dense", "lfm2",
    "minimax_m2", "xglm", "gemma3n_text",
)  # fmt: skip

TYPES = """
## Every causal model type

What happened to a tiny random model of every causal type of transformers {version}, as
[try_model_types.py](try_model_types.py) found it: packed whole, verified, and compared with the base. The family is
proved while it is packed (blocks dropped, cache, adapter and merged). The tests try a dozen unlike types in every run,
and tune and plug in all of them with `--every-form`.

{counts}

Of the {popular} model types that are downloaded most, {working} work. Which they are is our best public knowledge of
early 2026, and no measurement:

"""

VISION = """
## Image encoders

| model type | bundle | plug-in | its head reads | image sizes | tested forms |
|---|---|---|---|---|---|
"""

VISION_NOTES = """
For every form: with all blocks kept the bundle computes what the base does, bit for bit; with blocks dropped what a
truncated base does; block by block equals transformers' blocks; refit brings the emulator closer, also where a block
scales what its MLP gives; LoRA and full tuning go through pack, verify, tune and plug-in; the data owner's own view and
the plug-in, which `AutoModelForImageClassification` loads without a missing or unexpected tensor, have the same loss to
1e-5; an untouched return gives the base's encoder back bit for bit.

- A bundle is the encoder alone: the owner's classifier, class names, poolers and text tower are left out. It loads with
  `AutoModel`; of ViT and DeiT say `add_pooling_layer=False`, else transformers adds a pooler of random weights to
  what is used.
- DINOv2's head may also read one of its two parts (setting `pooling`): the other one's weights are zero.
- LoRA is on all linear layers of a block, under the names of transformers' modules. Its plug-in is merged: an adapter
  folder has no place for a classifier.
- For language models alone, and refused of an encoder: bottlenecks, search and clusters, declared module kinds, and the
  cross-entropy in distillation.
- Refused: DINOv2 with a gated feed-forward (`use_swiglu_ffn`, the giant one).
- `timm_wrapper` is timm's EVA, EVA-02 and plain ViT, of the names in
  [timm_family.py](../src/offsite/models/families/timm_family.py), and needs the extra `timm` to heal, tune and
  evaluate; torchvision must fit torch. Its tests skip where timm does not import
  ([what was tested where](decisions/0020-timm.md)). LoRA is on all but EVA's matrix of queries, keys and values.
- `offsite import` takes the image tower out of CLIP and SigLIP checkpoints in safetensors, and a DINOv2 encoder out of
  an ONNX file of torch's exporter; a folder as timm publishes it becomes a base with settings for Pillow.

"""

SPELLINGS = """
## Spellings

Tensors are read under the names of published files too: without the body's prefix (`h.0.`, `layers.0.`,
`decoder.layers.0.`), with masks and rotary frequencies among the weights, with a tied head stored all the same, with
GPT-NeoX's head as `embed_out` or `lm_head`. Configs may hold the block count under two keys, `torch_dtype`, rotary
settings among the others, and no lists with an entry per block: these are derived as transformers does, then cut.
Each spelling packs to the same bundle (tested), and a merged plug-in keeps that of the base.

Refused: models that need code of their own, and the switches listed above.

## Mixtures of experts

In files an expert is a matrix for each of its linear layers (`mlp.experts.0.gate_proj.weight`). In transformers'
modules all experts of a block are two stacks (`mlp.experts.gate_up_proj`). Manifests, full returns and bundles have the
names of files; a base may also hold the stacks, as `save_pretrained(..., save_original_format=False)` writes them, and
a merged plug-in keeps what the base has ([why](decisions/0010-experts-in-files-and-modules.md)).

- A config that places dense blocks by a step is packed with a list: `mlp_only_layers` names those of the bundle.
- `full` trains experts, routers, shared expert and dense blocks; each expert comes back under its name in files.
- `lora` is on attention alone: PEFT takes the other layers, named by block, for the experts of every block, the
  emulator's too, in tuning and again when the plug-in is loaded. The router is no target.
- The loss is the cross-entropy of the labels alone: the routers' balancing loss (`output_router_logits`,
  `router_aux_loss_coef`) is off and does not travel. Mixtral's `router_jitter_noise` travels; it is at work in trained
  blocks while they train.
- Refit solves the last layer of one expert after the other, each on the tokens that go to it; the expert that all
  tokens use comes first. Calibrated pruners see the same tokens; an expert to which none go loses its smallest weights.
- `pack --narrow-experts` removes whole experts from the emulator's blocks, `--narrow` and `--narrow-heads` heads
  ([how](decisions/0031-narrower-blocks.md)); no other stored form works with mixtures.
- Experts run in a loop of ours ([models/mixture.py](../src/offsite/models/mixture.py)), in fp32 and bf16: the outputs
  are those of transformers' loop bit for bit, and the same at every run (tested on CPUs).

## Adding a family's row

Models of a type without a row work. A row adds what cannot be read off a model: older spellings in published files,
stored forms of emulators (`--bits`, `--svd-rank`, `--mlp-width`), and an independent description of the family at both
parties.
For StarCoder 2 it would be

```python
"""

WORKED_EXAMPLE = """Architecture(
    model_type="starcoder2",
    class_name="Starcoder2ForCausalLM",
    blocks="model.layers",
    embeddings={"model.embed_tokens.weight": "vocab_size hidden_size"},
    final=_norm("model.norm"),
    head="lm_head.weight",
    tied_by_default=True,
    linears={
        **_ATTENTION,
        **_ATTENTION_OUT,
        "mlp.c_fc": "intermediate_size hidden_size",
        "mlp.c_proj": "hidden_size intermediate_size",
    },
    norms=_norm("input_layernorm") | _norm("post_attention_layernorm"),
    biases={"use_bias": (*_ATTENTION, *_ATTENTION_OUT, "mlp.c_fc", "mlp.c_proj")},
    defaults={"use_bias": True},
    attention_out="self_attn.o_proj",
    mlp_out="mlp.c_proj",
    count_keys=("num_hidden_layers",),
    config_keys=_COMMON
    | _ROTARY
    | _words(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "norm_epsilon sliding_window attention_dropout residual_dropout embedding_dropout use_bias"
    ),
)"""

STEPS = """
```

1. Write the row into `FAMILIES`, by the family's file in transformers: which config key switches a tensor off, whether
   anything but additions and norms follows `mlp_out` (then `linear_residual` stays False, and refit follows the
   gradient) and which norms do (`mlp_norms`, `attention_norms`), which switch makes a block depend on its place
   (`refused`), a cap on the logits (`logit_cap`), and older names in files (`spellings`).
2. A config list with an entry per block needs its rule in `per_block`: what transformers derives where a config
   leaves it out.
3. Take keys out of `config_keys` that the network does not compute with: what stands there travels to the other
   party.
4. Give the family sizes in `_SETTINGS` and its forms in `KINDS` of tests/tiny.py, older spellings in
   tests/model_owner/test_spellings.py, run `make docs` and `make test`.
"""


def render() -> str:
    """The text of docs/models.md."""
    rows = sorted(
        (family for family in ARCHITECTURES.values() if family.vision is None), key=lambda family: family.model_type
    )
    lines = [
        f"| {one.model_type} | {one.class_name} | {'yes' if one.tied_by_default else 'no'} | {_refit(one)} |"
        for one in rows
    ]
    return "".join(
        [
            INTRODUCTION,
            FAMILY_TABLE,
            "\n".join(lines) + "\n",
            "\n## What was tested\n",
            TESTED,
            "\n".join(_details(family) for family in rows) + "\n",
            _types(),
            VISION,
            "\n".join(_encoder(family) for family in sorted(_encoders(), key=lambda family: family.model_type)) + "\n",
            VISION_NOTES,
            SPELLINGS,
            WORKED_EXAMPLE,
            STEPS,
        ]
    )


def _types() -> str:
    """What happened to each causal model type."""
    found = json.loads((HERE / "results" / "model-types.json").read_text(encoding="utf-8"))
    types: dict[str, dict[str, Any]] = found["types"]
    works = {name for name, one in types.items() if one["status"] in ("row", "derived")}
    names = {
        "row": "has a row",
        "derived": "is read off the model and proved",
        "refused": "is refused",
        "not made": "could not be made tiny",
    }
    tally = Counter(one["status"] for one in types.values())
    counts = "| a model of the type | types |\n|---|---|\n" + "\n".join(
        f"| {names[status]} | {tally[status]} |" for status in names
    )
    head = TYPES.format(
        version=found["transformers"],
        counts=counts,
        popular=len(POPULAR),
        working=sum(name in works for name in POPULAR),
    )
    rows = [f"`{name}` ({types[name]['status']})" if name in works else f"`{name}` (no)" for name in POPULAR]
    return "".join(
        [
            head,
            ", ".join(rows) + ".\n\n",
            "| model type | what happens | methods | kinds of blocks | LoRA on, or why not |\n|---|---|---|---|---|\n",
            "\n".join(_type(name, one) for name, one in types.items()) + "\n",
        ]
    )


def _type(name: str, one: dict[str, Any]) -> str:
    lora = ", ".join(f"`{path}`" for path in one.get("lora", ()))
    why = one.get("why", "").replace("|", "/").replace("<", "").replace(">", "")
    return (
        f"| {name} | {one['status']} | {', '.join(one.get('methods', ()))} | {one.get('kinds', '')} | {lora or why} |"
    )


def _encoders() -> list[Architecture]:
    return [family for family in ARCHITECTURES.values() if family.vision is not None]


def _encoder(family: Architecture) -> str:
    vision = family.vision
    assert vision is not None
    read = {"class": "class token", "mean": "mean of patches", "pooled": "what its config pools"}
    forms = "; ".join(kind for kind, form in VISION_KINDS.items() if form["family"] == family.model_type)
    features = " and ".join(read[name] for name in vision.features)
    sizes = "any that patches fill" if vision.any_size else "its own"
    return f"| {family.model_type} | {family.class_name} | {vision.class_name} | {features} | {sizes} | {forms} |"


def _refit(family: Architecture) -> str:
    """How refit finds the MLP's output layer, and that of attention where it does so in another way."""
    mlp = _refit_way(family.linear_residual, family.mlp_norms, experts=family.experts is not None, part="mlp")
    known = family.linear_residual if family.linear_attention is None else family.linear_attention
    attention = _refit_way(known, family.attention_norms, experts=False, part="attention")
    return mlp if attention == mlp else f"{mlp}; attention {attention}"


def _refit_way(known: bool, norms: Mapping[str, str], *, experts: bool, part: str) -> str:
    if not known:
        return "as measured" if part == "mlp" else "by gradient"
    if experts:
        return "expert by expert"
    conditions = list(dict.fromkeys(norms.values()))
    if conditions == [""]:
        return "in front of the norm"
    switched = [f", in front of the norm where the config has `{condition}`" for condition in conditions]
    return f"in closed form{''.join(switched)}"


def _details(family: Architecture) -> str:
    forms = "; ".join(kind for kind, form in KINDS.items() if form["family"] == family.model_type)
    parts = [f"- **{family.model_type}**: {forms}. LoRA on `{'`, `'.join(family.lora_linears)}`."]
    if family.per_block or family.listed:
        parts.append(f"Cut with the blocks: `{'`, `'.join((*family.per_block, *family.listed))}`.")
    parts += [f"Refused with `{switch}`: {why}." for switch, why in family.refused.items()]
    if family.logit_cap:
        parts.append(f"Logits are capped by `{family.logit_cap}`.")
    return " ".join(parts)


if __name__ == "__main__":
    (HERE / "models.md").write_text(render(), encoding="utf-8")
