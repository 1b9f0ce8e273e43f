"""Makes a base folder with the shapes of Llama 2 (7B to 70B) but no weights, which takes almost no disk space.

    python -m benchmarks.hollow_base 7b FOLDER

The files have valid headers, and their data is a hole (sparse files). `offsite pack FOLDER --out OUT --for NAME --plan`
reads only the config and the headers, so it can plan for models that are too large for this machine.
"""

import argparse
import json
import sys
from pathlib import Path

from offsite.storage.checkpoint_folder import INDEX
from offsite.storage.safetensors_files import ITEM_SIZE

# Llama 2 in the sizes of its paper (arXiv 2307.09288), and Sheared Llama (arXiv 2310.06694).
SIZES = {
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16,
             "num_key_value_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
}  # fmt: skip
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5, "dtype": "bfloat16",
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def main() -> None:
    """Write a base folder in the size that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    wanted = parser.parse_args()
    config = COMMON | SIZES[wanted.size]
    write_settings(wanted.folder, config)
    _write(wanted.folder, {f"{name}.weight": shape for name, shape in shapes_of(config).items()})


def write_settings(folder: Path, config: dict[str, object]) -> None:
    """Make a base folder with this config and a tokenizer, without weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny import tiny_tokenizer

    tiny_tokenizer(folder)


def shapes_of(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of a Llama model with this config, by its name without ".weight"."""
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    hidden, inner, heads, key_heads, blocks = (int(str(config[key])) for key in keys)
    words = int(str(config["vocab_size"]))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (words, hidden), "model.norm": (hidden,)}
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (128 * heads, hidden),
        "self_attn.k_proj": (128 * key_heads, hidden),
        "self_attn.v_proj": (128 * key_heads, hidden),
        "self_attn.o_proj": (hidden, 128 * heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for index in range(blocks):
        shapes |= {f"model.layers.{index}.{path}": shape for path, shape in block.items()}
    return shapes | {"lm_head": (words, hidden)}


def _write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write sparse safetensors files and their index: one file for each matrix, with the vectors that follow it."""
    files: list[dict[str, tuple[int, ...]]] = []
    for name, shape in shapes.items():
        if len(shape) > 1:
            files.append({})
        files[-1][name] = shape
    weight_map = {}
    for number, held in enumerate(files, 1):
        file = folder / f"model-{number:05}-of-{len(files):05}.safetensors"
        header, offset = {}, 0
        for name, shape in held.items():
            size = ITEM_SIZE["BF16"]
            for length in shape:
                size *= length
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file.name
        raw = json.dumps(header).encode()
        with file.open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + offset)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    main()
