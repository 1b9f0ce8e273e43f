"""A tokenizer.model alone: the error names the package that reads it, by what the file holds."""

import importlib.util
from pathlib import Path

import pytest

from artifacts import copied_folder
from model_owner.importing.test_import_model import as_bin
from offsite.errors import UsageError
from offsite.model_owner.importing.import_model import import_model
from offsite.models.tokenizers import load_tokenizer
from tiny import MakeBase

FILES = {
    "sentencepiece": b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02",
    "tiktoken": b"IQ== 0\nIg== 1\nIw== 2\n",
}


def lone(base: Path, out: Path, package: str) -> Path:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    folder = copied_folder(base, out)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(FILES[package])
    return folder


@pytest.mark.parametrize("package", FILES)
def test_the_package_is_named(base_of: MakeBase, tmp_path: Path, package: str) -> None:
    folder = lone(base_of(), tmp_path / "base", package)
    with pytest.raises(UsageError, match=r"tokenizer\.model is a tokenizer of") as caught:
        load_tokenizer(folder)
    assert f"pip install {package}" in str(caught.value.next_step)
    others = FILES.keys() - {package}
    assert not any(other in str(caught.value) for other in others)


@pytest.mark.parametrize("package", FILES)
def test_the_package_is_named_at_import(base_of: MakeBase, tmp_path: Path, package: str) -> None:
    folder = as_bin(lone(base_of(), tmp_path / "base", package), tmp_path / "bin")
    with pytest.raises(UsageError) as caught:
        import_model(folder, tmp_path / "out")
    assert f"pip install {package}" in str(caught.value.next_step)
    assert not (tmp_path / "out").exists()


def test_beside_a_fast_tokenizer_nothing_is_needed(base_of: MakeBase, tmp_path: Path) -> None:
    folder = copied_folder(base_of(), tmp_path / "base")
    (folder / "tokenizer.model").write_bytes(FILES["sentencepiece"])
    assert load_tokenizer(folder).eos_token == "</s>"
