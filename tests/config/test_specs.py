import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from offsite.config import (
    TABLES,
    EvalSpec,
    ImportSpec,
    PackSpec,
    PermitSettings,
    PlugInSpec,
    Spec,
    TuneSpec,
    load_spec,
    unpermitted,
)
from offsite.errors import UsageError


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    return file


def test_defaults() -> None:
    assert load_spec(PackSpec, {}) == PackSpec()
    assert PackSpec().permits.methods == ("lora", "full", "bitfit", "bottleneck")
    for spec in TABLES.values():
        assert load_spec(spec, {}) == spec()


@pytest.mark.parametrize(
    ("blocks", "bottom", "top", "ends"),
    [
        (30, None, None, (4, 6)),
        (36, None, None, (5, 7)),
        (24, None, None, (3, 5)),
        (12, None, None, (2, 2)),
        (6, None, None, (2, 2)),
        (5, None, None, (2, 2)),
        (4, None, None, (1, 2)),
        (3, None, None, (1, 1)),
        (2, None, None, (0, 1)),
        (4, 3, None, (3, 0)),
        (4, None, 1, (2, 1)),
        (30, 0, None, (0, 6)),
        (30, 2, 0, (2, 0)),
    ],
)
def test_ends_follow_the_depth_unless_given(
    blocks: int, bottom: int | None, top: int | None, ends: tuple[int, int]
) -> None:
    trained = {*range(ends[0]), *range(blocks - ends[1], blocks)}
    assert PackSpec(bottom=bottom, top=top).verbatim(blocks) == trained


def test_given_over_file_over_default(tmp_path: Path) -> None:
    file = toml(tmp_path, '[pack]\nbottom = 3\ntop = 4\nheal = "none"\n[tune]\nrank = 2\n')
    spec = load_spec(PackSpec, {"bottom": 5, "top": None, "keep": None}, file)
    assert (spec.split.bottom, spec.split.top, spec.select.keep, spec.heal.steps) == (5, 4, PackSpec().select.keep, ())
    assert load_spec(TuneSpec, {}, file).adapter.rank == 2
    assert load_spec(EvalSpec, {}, file) == EvalSpec()


def test_table_with_a_dash_and_key_that_is_a_keyword(tmp_path: Path) -> None:
    file = toml(tmp_path, '[plug-in]\nas = "merged"\nagain = true\n')
    assert load_spec(PlugInSpec, {}, file) == PlugInSpec(as_="merged", again=True)
    assert load_spec(PlugInSpec, {"as": "adapter"}, file).as_ == "adapter"


def test_a_flag_takes_the_place_of_what_the_file_says_in_another_way(tmp_path: Path) -> None:
    file = toml(tmp_path, "[tune]\nmax_steps = 3\n[pack]\nbottom = 3\ntop = 1\n[plug-in]\nstrength = 0.5\n")
    assert load_spec(TuneSpec, {"epochs": 2.0}, file).explicit_keys == {"epochs"}
    assert load_spec(TuneSpec, {"epochs": None}, file).explicit_keys == {"max_steps"}
    assert load_spec(PackSpec, {"train": "0,5"}, file).explicit_keys == {"train"}
    assert load_spec(PackSpec, {"top": 2}, file).explicit_keys == {"bottom", "top"}
    assert load_spec(PlugInSpec, {"strengths": "0.5,1"}, file).explicit_keys == {"strengths"}


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (TuneSpec, {"epochs": 1.0, "max_steps": 2}),
        (PackSpec, {"train": "0,5", "top": 2}),
        (PackSpec, {"distill_epochs": 1.0, "distill_steps": 2}),
        (PlugInSpec, {"strength": 1.0, "strengths": "1"}),
    ],
)
def test_flags_that_say_one_thing_in_two_ways_are_refused(kind: type[Spec], given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{' and '.join(given)} were both given"):
        load_spec(kind, given)


def test_a_change_takes_the_place_of_what_was_said_in_another_way() -> None:
    assert TuneSpec(max_steps=3).changed({"epochs": 2.0}).length.max_steps is None
    assert TuneSpec(epochs=2.0).changed({"max_steps": None}).length.epochs == 2.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[pack]\nbotom = 3\n", "botom"),
        ("[tune]\nbotom = 3\n", "botom"),  # also in another stage's table
        ("[packing]\nbottom = 3\n", "packing"),
        ("bottom = 3\n", "bottom"),
        ("pack = 3\n", "pack"),
        ("[pack\n", "is not TOML"),
        ("[pack]\nbottom = 'x'\n", "bottom"),
        ("[pack]\nbottom = -1\n", "bottom"),
        ("[pack]\nkeep = 0\n", "keep"),
        ("[pack]\nbottom = 0\ntop = 0\n", "nothing would train"),
        ("[pack]\nmethods = []\n", "methods"),
        ("[pack]\nselect = 'best'\n", "select"),
        ("[pack]\nrefit_maps = []\n", "refit_maps"),
        ("[pack]\nrefit_maps = ''\n", "refit_maps"),
        ("[pack]\nrefit_maps = 'mlp,head'\n", "refit_maps"),
        (f"[pack]\nrefit_maps = {['mlp'] * 9}\n", "refit_maps"),
        ("[pack]\nheal = 'distill'\nrefit_maps = 'attention,mlp'\n", "heal = refit"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_spec(PackSpec, {}, toml(tmp_path, text))
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_maps_of_refit_are_a_chain_or_a_list(tmp_path: Path) -> None:
    assert load_spec(PackSpec, {}).heal.refit_maps == ("mlp",)
    for written in ("'attention, mlp'", "['attention', 'mlp']"):
        assert load_spec(PackSpec, {}, toml(tmp_path, f"[pack]\nrefit_maps = {written}\n")).heal.refit_maps == (
            "attention",
            "mlp",
        )


def test_a_byte_order_mark_is_no_setting(tmp_path: Path) -> None:
    assert load_spec(TuneSpec, {}, toml(tmp_path, "\ufeff[tune]\nrank = 2\n")).adapter.rank == 2


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the settings file"):
        load_spec(PackSpec, {}, tmp_path / "nothing.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfea")  # UTF-16 by its mark, and half a letter
    with pytest.raises(UsageError, match="is no text"):
        load_spec(PackSpec, {}, tmp_path / "binary")


@pytest.mark.parametrize(
    ("kind", "settings"), [(TuneSpec, {"lora_alpha": 1e6}), (TuneSpec, {"seed": 2**64}), (PackSpec, {"seed": 2**64})]
)
def test_numbers_that_a_manifest_or_a_generator_cannot_take(kind: type[Spec], settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="are wrong"):
        load_spec(kind, settings)


def test_every_mistake_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        load_spec(TuneSpec, {"rank": 0, "lr": -1.0, "method": "dora", "unknown": 1})
    assert sorted(reason.split(":")[0] for reason in caught.value.reasons) == ["lr", "method", "rank", "unknown"]
    assert "found 0" in str(caught.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(UsageError):
        load_spec(TuneSpec, {"lr": value})


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda", "cuda:1", "mps", "xpu"])
def test_devices(device: str) -> None:
    assert TuneSpec(device=device).runtime.device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cpu:0", "", "cuda:x", "cpu\n"])
def test_devices_that_are_none(device: str) -> None:
    with pytest.raises(ValidationError):
        TuneSpec(device=device)


@pytest.mark.parametrize("kind", [ImportSpec, PackSpec, TuneSpec, PlugInSpec, EvalSpec])
def test_specs_are_frozen_strict_and_described(kind: type[Spec]) -> None:
    spec = kind()
    with pytest.raises(ValidationError):
        kind.model_validate({"no_such_setting": 1})
    for key, setting in kind.settings().items():
        assert setting.field.description, f"{kind.__name__}: {key} is not described"
        with pytest.raises(ValidationError):
            setattr(spec if setting.group is None else getattr(spec, setting.group), setting.name, None)
    assert kind.model_validate(json.loads(json.dumps(spec.flat()))) == spec


@pytest.mark.parametrize("kind", [ImportSpec, PackSpec, TuneSpec, PlugInSpec, EvalSpec])
def test_a_group_is_small(kind: type[Spec]) -> None:
    sizes = Counter(setting.group for setting in kind.settings().values())
    assert max(sizes.values()) <= 12, sizes


def test_settings_are_written_flat_and_read_from_their_groups() -> None:
    spec = TuneSpec(rank=4, memory="6GiB", lr=1e-3)
    assert (spec.adapter.rank, spec.memory.budget, spec.optimizer.lr) == (4, "6GiB", 1e-3)
    assert spec.explicit_keys == {"rank", "memory", "lr"}
    assert spec.flat(explicit_only=True) == {"rank": 4, "memory": "6GiB", "lr": 1e-3}
    assert spec.flat(without={"rank"}).keys() == TuneSpec.settings().keys() - {"rank"}
    assert spec.values()["rank"] == 4


def test_a_changed_spec_is_checked_and_keeps_what_was_given() -> None:
    spec = PackSpec(keep=2, heal="refit", calibration=Path("x"))
    changed = spec.changed({"keep": 3})
    assert changed == PackSpec(keep=3, heal="refit", calibration=Path("x"))
    assert changed.explicit_keys == {"keep", "heal", "calibration"}
    with pytest.raises(ValidationError, match="keep"):
        spec.changed({"keep": 0})


def test_a_group_is_no_setting() -> None:
    with pytest.raises(ValidationError, match=r"'adapter' is a group, not a setting.* method, rank"):
        TuneSpec(adapter={"rank": 4})


def test_every_broken_rule_is_listed() -> None:
    with pytest.raises(UsageError) as caught:
        load_spec(PackSpec, {"drop_from": 3, "bits": 4, "svd_rank": 0.5})
    assert caught.value.reasons == (
        "settings: bits and svd_rank are different ways to store a matrix: choose one",
        "settings: drop_from has an effect only with select = contiguous",
    )


@pytest.mark.parametrize(
    ("settings", "kept", "pruned"),
    [
        ({}, 20, 0.5),
        ({"keep": 5}, 5, 0.0),
        ({"select": "influence"}, 6, 0.0),
        ({"heal": "share"}, 6, 0.0),
        ({"heal": "affine", "prune": 0.25}, 6, 0.25),
        ({"heal": "refit,distill"}, 20, 0.5),
        ({"select": "contiguous", "drop_from": 14}, 10, 0.0),
        ({"bits": 4}, 20, 0.0),
        ({"keep": 8, "zeros": "left-out"}, 8, 0.5),
    ],
)
def test_what_another_setting_needs_is_the_default(settings: dict[str, Any], kept: int, pruned: float) -> None:
    spec = load_spec(PackSpec, settings)
    assert (spec.kept(range(4, 24)), spec.pruned) == (kept, pruned)


@pytest.mark.parametrize("kind", TABLES.values())
def test_every_rule_is_said_in_words(kind: type[Spec]) -> None:
    assert all(check.__doc__ for check in kind.rules())


def test_what_the_owner_does_not_permit() -> None:
    permits = PermitSettings(methods=("lora", "bottleneck"), max_rank=8, max_width=4)
    assert not unpermitted(TuneSpec(rank=8, width=9), permits)
    assert [one.key for one in unpermitted(TuneSpec(rank=9, tune_head=True), permits)] == ["rank", "tune_head"]
    assert [one.key for one in unpermitted(TuneSpec(method="bottleneck", width=9), permits)] == ["width"]
    assert [one.setting for one in unpermitted(TuneSpec(method="full"), permits)] == ["methods"]


def test_problems_name_the_key_without_its_group() -> None:
    with pytest.raises(UsageError) as caught:
        load_spec(TuneSpec, {"rank": 0, "memory": "much", "seed": -1})
    assert sorted(reason.split(":")[0] for reason in caught.value.reasons) == ["memory", "rank", "seed"]


def test_a_strangers_keys_are_printable() -> None:
    with pytest.raises(UsageError) as caught:
        load_spec(PackSpec, {"\x1b[2J": 1, "x" * 500: "y" * 500})
    assert all(reason.isprintable() and len(reason) < 300 for reason in caught.value.reasons)


def test_every_table_has_a_spec() -> None:
    tables: dict[str, Any] = dict(TABLES)
    assert set(tables) >= {"import", "pack", "tune", "plug-in", "eval"}
    assert all(issubclass(spec, Spec) for spec in tables.values())
