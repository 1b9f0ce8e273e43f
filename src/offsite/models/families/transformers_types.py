"""The causal model types of the installed transformers, and the keys of their configs, from its sources. Torch-free.

The sources are parsed, and none of them is imported: the classes themselves need torch, and a receiver checks a bundle
before anything of it is run.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path

_BASE = "PreTrainedConfig"
# What a config of every type may hold, in addition to the keys that its class declares.
_ALWAYS = frozenset({"architectures", "model_type", "dtype", "tie_word_embeddings", "use_cache"})
# Declared by some class, and no setting of a decoder: other code, other files, other weights, or another model within.
_NEVER = frozenset(
    {
        "auto_map", "quantization_config", "kernel_config", "transformers_weights", "attn_implementation", "backbone",
        "experts_implementation", "use_timm_backbone", "use_pretrained_backbone", "backbone_config", "backbone_kwargs",
        "per_layer_config", "name_or_path", "id2label", "label2id", "torch_dtype", "transformers_version",
    }
)  # fmt: skip


def causal_class(model_type: str) -> str | None:
    """The class that transformers' causal mapping names for a model type; None if it has no such type."""
    return _table("modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES").get(model_type)


def causal_types() -> tuple[str, ...]:
    """The model types of transformers' causal mapping, in alphabetical order; empty if there is no transformers."""
    return tuple(sorted(_table("modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")))


@cache
def config_keys(model_type: str) -> frozenset[str]:
    """The config keys that a bundle of this model type may contain; empty if the type's config class is not found."""
    class_name = _table("auto_mappings.py", "CONFIG_MAPPING_NAMES").get(model_type)
    if class_name is None:
        return frozenset()
    modules = _table("auto_mappings.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME")
    folder = modules.get(model_type, model_type.replace("-", "_"))
    declared = frozenset[str]().union(*(_fields(file, class_name) for file in _config_files(folder)))
    usable = {key for key in declared - _NEVER if not key.startswith("_")}
    return frozenset(usable | _ALWAYS) if declared else frozenset()


@cache
def _folder() -> Path | None:
    """The folder of the installed transformers; None if it is not installed."""
    spec = importlib.util.find_spec("transformers")  # of a package at the top, which this does not import
    found = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(found[0]) if found else None


def _config_files(folder: str) -> list[str]:
    """The source files of a model's folder that contain config classes."""
    found = _folder()
    return (
        sorted(str(file.relative_to(found)) for file in found.glob(f"models/{folder}/configuration_*.py"))
        if found
        else []
    )


@cache
def _parsed(path: str) -> ast.Module | None:
    """The syntax tree of a source file of transformers, by its path in the package; None if it cannot be read."""
    folder = _folder()
    try:
        return None if folder is None else ast.parse((folder / path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None


@cache
def _table(file: str, name: str) -> dict[str, str]:
    """A table of strings in a file of transformers' `models/auto`, by the variable's name; {} if not found."""
    tree = _parsed(f"models/auto/{file}")
    for node in tree.body if tree is not None else ():
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name) or node.targets[0].id != name:
            continue
        pairs = [one.elts for one in ast.walk(node.value) if isinstance(one, ast.Tuple) and len(one.elts) == 2]
        return {
            key.value: value.value
            for key, value in pairs
            if isinstance(key, ast.Constant)
            and isinstance(value, ast.Constant)
            and isinstance(key.value, str)
            and isinstance(value.value, str)
        }
    return {}


@cache
def _fields(file: str, class_name: str) -> frozenset[str]:
    """The fields that a config class and its base classes in the same file declare."""
    tree = _parsed(file)
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            own = {
                one.target.id
                for one in node.body
                if isinstance(one, ast.AnnAssign)
                and isinstance(one.target, ast.Name)
                and "ClassVar" not in ast.unparse(one.annotation)
            }
            own |= _other_names(node)
            bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != _BASE]
            return frozenset(own).union(*(_fields(file, base) for base in bases))
    return frozenset()


def _other_names(node: ast.ClassDef) -> set[str]:
    """The keys in a config class's `attribute_map`, which defines second names for keys: both names."""
    maps = [
        one.value for one in node.body if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "attribute_map"
    ]
    names = [one for found in maps if isinstance(found, ast.Dict) for one in (*found.keys, *found.values)]
    return {one.value for one in names if isinstance(one, ast.Constant) and isinstance(one.value, str)}
