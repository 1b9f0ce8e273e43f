"""Whatever bytes come: the documented error, or a sound result; never another exception, never a hang."""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offsite.errors import IncompatibleError, StorageError
from offsite.models.families.architectures import ARCHITECTURES, config_problems
from offsite.protocol.contents import ALLOWED_KEYS, content_problems
from offsite.protocol.manifest import ManifestProblem, parse_manifest, render_manifest
from offsite.storage.safetensors_files import ITEM_SIZE, read_chunks, read_header

QUICK = settings(
    max_examples=settings.default.max_examples if settings.get_current_profile_name() == "long" else 40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
NUMBERS = st.integers(-2, 20) | st.integers() | st.booleans() | st.floats()
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_SIZE, "F8"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 20), min_size=2, max_size=2) | JSON,
    }
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "\x1b"]), ENTRIES | JSON, max_size=3)


def read(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(content)
        refusal: StorageError | None = None
        try:
            tensors = read_header(file)
        except StorageError as error:
            refusal, tensors = error, {}
        assert refusal is None or (refusal.reasons and str(refusal).replace("\n", "").isprintable())
        # what passes describes the file exactly, and can be read to the last byte
        assert sum(tensor.size for tensor in tensors.values()) <= len(content)
        for tensor in tensors.values():
            assert sum(len(chunk) for chunk in read_chunks(tensor)) == tensor.size


@QUICK
@given(st.binary(max_size=64))
def test_any_bytes_as_safetensors(content: bytes) -> None:
    read(content)


@QUICK
@given(HEADERS, st.integers(0, 40))
def test_any_header(header: dict[str, Any], data: int) -> None:
    raw = json.dumps(header).encode()
    read(len(raw).to_bytes(8, "little") + raw + bytes(data))


@QUICK
@given(st.data())
def test_a_sound_file_with_changed_bytes(data: st.DataObject) -> None:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    raw = json.dumps(header).encode()
    content = bytearray(len(raw).to_bytes(8, "little") + raw + bytes(8))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    read(bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else bytes(content))


def parse(raw: bytes) -> None:
    reasons: list[str] | None = None
    try:
        manifest = parse_manifest(raw)
    except ManifestProblem as problem:
        reasons = problem.reasons
    if reasons is None:
        assert parse_manifest(render_manifest(manifest)) == manifest
    else:
        assert reasons
        assert all(reason.isprintable() for reason in reasons), reasons


@QUICK
@given(st.binary(max_size=64))
def test_any_bytes_as_a_manifest(raw: bytes) -> None:
    parse(raw)


@QUICK
@given(JSON)
def test_any_json_as_a_manifest(content: Any) -> None:
    parse(json.dumps(content).encode())


TARGET = "model.layers.0.mlp.up_proj"
SOUND: list[dict[str, Any]] = [
    {
        "kind": "bundle", "format": 1, "requires": [], "issued_at": "2026-01-01T00:00:00Z", "issuer": "0" * 64,
        "files": [{"name": "config.json", "size": 3, "sha256": "0" * 64}], "recipient": "1" * 64, "base": "2" * 64,
        "tokenizer": "3" * 64, "architecture": "llama", "split": {"bottom": 1, "emulator": 1, "top": 0},
        "methods": ["lora"], "max_rank": 8, "max_width": 8,
        "tensors": {f"{TARGET}.weight": {"shape": [4, 4], "dtype": "F32"}},
        "lora_targets": {TARGET: [4, 4]},
    },
    {
        "kind": "return", "format": 1, "requires": [], "files": [], "bundle": "0" * 64, "signer": "1" * 64,
        "recipient": "2" * 64, "method": "lora", "lora": {"rank": 1, "alpha": 2.0, "targets": [TARGET]},
        "tensors": {"a": {"shape": [4, 4], "dtype": "F32"}},
    },
    {
        "kind": "plug-in", "format": 1, "requires": [], "files": [], "form": "adapter", "architecture": "llama",
        "base": "0" * 64, "bundle": "1" * 64, "returned": "2" * 64, "issuer": "3" * 64,
    },
]  # fmt: skip


def test_the_sound_ones_are_sound() -> None:
    for content in SOUND:
        parse_manifest(json.dumps(content).encode())


@QUICK
@given(st.sampled_from(SOUND), st.data())
def test_a_sound_manifest_with_anything_in_one_place(content: dict[str, Any], data: st.DataObject) -> None:
    changed = json.loads(json.dumps(content))
    place = changed
    key = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    if data.draw(st.booleans()):
        place[key] = data.draw(JSON)
    else:
        place[data.draw(st.text(max_size=6))] = data.draw(JSON)
    parse(json.dumps(changed).encode())


@QUICK
@given(st.sampled_from(sorted(ALLOWED_KEYS)), JSON)
def test_any_settings_file(name: str, content: Any) -> None:
    assert isinstance(content, dict) or content_problems(name, content)


@QUICK
@given(st.sampled_from(sorted(ARCHITECTURES)), st.data())
def test_any_config(family: str, data: st.DataObject) -> None:
    family = ARCHITECTURES[family]
    config = data.draw(
        st.dictionaries(st.sampled_from(sorted(family.config_keys)) | st.text(max_size=5), JSON, max_size=4)
    )
    problems = config_problems(config, family)
    assert problems or set(config) <= family.config_keys
    family.set_switches(config)
    family.outer_tensors(config)
    with contextlib.suppress(IncompatibleError):  # what verify makes a finding of
        for path in list(family.block_tensors(config, 1))[:40]:
            family.shape_problem(family.in_block(1, path), (1,), config)
