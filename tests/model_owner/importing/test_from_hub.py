"""The hub is played by a folder: which files are asked for, and what an error of each kind becomes."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from offsite.cli import main
from offsite.errors import OffsiteError, UsageError
from offsite.model_owner.importing.from_hub import HubAddress, download_from_hub, hub_address
from tiny import MakeBase

Unreachable: Any = HfHubHTTPError.__bases__[0]  # what the HTTP library raises without a network


class Hub:
    """A model of the hub, as its files; `cache` has what was fetched."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.files, self.refusal = cache, dict[str, bytes](), None
        self.asked: list[Any] = []
        self.refusal: Exception | None = None
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, *words, **more: self.info(*words, **more))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)

    def info(self, model: str, revision: str | None, files_metadata: bool) -> Any:
        self.asked.append((model, revision))
        if self.refusal:
            raise self.refusal
        siblings = [SimpleNamespace(rfilename=name, size=len(content)) for name, content in self.files.items()]
        return SimpleNamespace(sha="abc", siblings=siblings)

    def snapshot(
        self, model: str, revision: str | None, allow_patterns: Any = (), local_files_only: bool = False
    ) -> str:
        if local_files_only:
            if not self.cache.exists():
                raise LocalEntryNotFoundError("not there")
            return str(self.cache)
        assert revision == "abc"  # the files are those that were listed
        for name, content in self.files.items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                (self.cache / name).write_bytes(content)
        return str(self.cache)

    def fetched(self) -> set[str]:
        return {path.relative_to(self.cache).as_posix() for path in self.cache.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "cache", monkeypatch)


def answered(kind: "Callable[..., Exception]", code: int) -> Exception:
    return kind("said no\nand more", response=SimpleNamespace(headers={}, status_code=code, request=None))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:org/name", HubAddress("org/name", None, None)),
        ("hub:org/na.me-1@v1.0", HubAddress("org/na.me-1", None, "v1.0")),
        ("hub:org/name/sub/q4.gguf@refs/pr/1", HubAddress("org/name", "sub/q4.gguf", "refs/pr/1")),
        ("org/name", None),
        ("./hub:org/name", None) if Path("./hub:x").as_posix() != "hub:x" else ("models/hub", None),
    ],
)
def test_addresses(text: str, expected: HubAddress | None) -> None:
    assert hub_address(Path(text)) == expected


@pytest.mark.parametrize("text", ["hub:name", "hub:", "hub:a/b/c", "hub:a/b@", "hub:../b/c.gguf@x y"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="names no model of the hub"):
        hub_address(Path(text))


def test_a_model_is_downloaded_and_imported(
    hub: Hub, base_of: MakeBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files = {path.name: path.read_bytes() for path in base_of("llama", 2).iterdir()}
    hub.files |= {"modeling_own.py": b"raise SystemExit", "pytorch_model.bin": b"a pickle", "README.md": b"x"}
    assert main(["import", "hub:org/name@v2", "--out", str(tmp_path / "base"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "base")
    assert hub.asked == [("org/name", "v2")]
    assert "model.safetensors" in hub.fetched()
    assert not hub.fetched() & {"modeling_own.py", "pytorch_model.bin", "README.md"}
    assert (tmp_path / "base" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json", "model.safetensors", "x.gguf", "onnx/model.onnx"], {"config.json", "model.safetensors"}),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
        ),
        (["pytorch_model.bin", "tf_model.h5", "tokenizer.model"], {"pytorch_model.bin", "tokenizer.model"}),
        (["q4.gguf", "mmproj-q4.gguf", "README.md"], {"q4.gguf"}),
    ],
)
def test_one_form_of_the_weights_is_fetched(names: list[str], expected: set[str], hub: Hub) -> None:
    hub.files = dict.fromkeys(names, b"x")
    download_from_hub(HubAddress("org/name", None, None))
    assert hub.fetched() == expected


def test_one_of_several_gguf_files(hub: Hub) -> None:
    hub.files = {"q4.gguf": b"x", "q8.gguf": b"y", "extra/q2.gguf": b"z"}
    with pytest.raises(UsageError, match="has 3 GGUF files") as caught:
        download_from_hub(HubAddress("org/name", None, None))
    assert "hub:org/name/extra/q2.gguf" in str(caught.value.next_step)
    file = download_from_hub(HubAddress("org/name", "extra/q2.gguf", None))
    assert file.read_bytes() == b"z"
    with pytest.raises(UsageError, match=r"has no file q3\.gguf"):
        download_from_hub(HubAddress("org/name", "q3.gguf", None))


@pytest.mark.parametrize(
    ("refusal", "kind", "says"),
    [
        (answered(GatedRepoError, 403), UsageError, "hf auth login"),
        (answered(RepositoryNotFoundError, 404), UsageError, "the hub has no model org/name"),
        (Unreachable("no route to host"), OffsiteError, "no route to host"),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), OffsiteError, "hf download org/name"),
    ],
)
def test_there_is_one_clear_error(refusal: Exception, kind: type[OffsiteError], says: str, hub: Hub) -> None:
    hub.refusal = refusal
    with pytest.raises(OffsiteError) as caught:
        download_from_hub(HubAddress("org/name", None, None))
    assert type(caught.value) is kind
    assert says in str(caught.value)
    assert "and more" not in str(caught.value)


def test_without_a_network_the_cache_is_enough(hub: Hub, base_of: MakeBase, tmp_path: Path) -> None:
    hub.refusal = Unreachable("no route to host")
    shutil.copytree(base_of("llama", 2), hub.cache)
    assert main(["import", "hub:org/name", "--out", str(tmp_path / "base")]) == 0
    assert (tmp_path / "base" / "model.safetensors").exists()


def test_offline_nothing_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real library, with HF_HUB_OFFLINE as the tests set it."""
    assert main(["import", "hub:org/name-that-nobody-has", "--out", str(tmp_path / "base")]) == 1
    assert "its cache has no copy" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
