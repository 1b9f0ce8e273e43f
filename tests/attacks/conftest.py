"""One honest exchange, made once; every attack spoils a copy of it."""

import shutil
from pathlib import Path

import pytest

from artifacts import bottleneck_return, full_return, lora_return, packed, packed_unopened, with_earlier
from attacks.lab import Lab
from offsite.config import PlugInSpec
from offsite.model_owner.intake import intake
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.protocol.artifacts import Base
from offsite.protocol.home import Home
from tiny import Parties, tiny_base, tiny_parties, tiny_vision_base


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    parties = tiny_parties(folder)
    base = tiny_base(folder / "base", "llama", 4)
    biased = packed(tiny_base(folder / "gpt2", "gpt2", 3), folder / "gpt2-bundle", parties)
    full_return(biased, folder / "bitfit", parties.data_owner, lambda name, shipped: shipped + 0.5, "bitfit")
    packed(tiny_base(folder / "qwen2", "qwen2", 3), folder / "qwen2-bundle", parties)
    mixture = tiny_base(folder / "mixture", "qwen3_moe", 3, mlp_only_layers=[0, 2])  # experts in the middle block
    packed(mixture, folder / "mixture-bundle", parties)
    settings = {"narrow_experts": 0.75, "calibration_tokens": 256}
    packed(mixture, folder / "narrow-mixture-bundle", parties, **settings)
    packed(base, folder / "declared-bundle", parties, keep=1, svd_rank=0.5, heal="affine", calibration_tokens=256)
    deep, middle = tiny_base(folder / "deep", "llama", 5), {"bottom": None, "top": None, "train": (0, 2, 4), "keep": 2}
    packed(deep, folder / "spread-bundle", parties, **middle)
    every = {"bottom": None, "top": None, "placement": "every", "keep": None}
    packed(base, folder / "every-bundle", parties, **every, mlp_width=0.5, bits=8)
    narrow = packed(
        tiny_base(folder / "biased", "gpt2", 3), folder / "every-gpt2-bundle", parties, **every, mlp_width=0.5
    )
    lora_return(narrow, folder / "every-lora", parties.data_owner)
    full_return(narrow, folder / "every-bitfit", parties.data_owner, method="bitfit")
    encoder = packed(tiny_vision_base(folder / "encoder", "dinov2", 3), folder / "encoder-bundle", parties)
    packed_unopened(tiny_vision_base(folder / "timm", "timm, eva", 3), folder / "timm-bundle", parties)
    full_return(encoder, folder / "encoder-full", parties.data_owner, classes=("cat", "dog"))
    bundle = packed(base, folder / "bundle", parties, keep=1, max_rank=8, max_width=8)
    lora_return(bundle, folder / "lora", parties.data_owner)
    full_return(bundle, folder / "full", parties.data_owner, lambda name, shipped: shipped + 0.5)
    bottleneck_return(bundle, folder / "bottleneck", parties.data_owner)
    untied = tiny_base(folder / "untied", "llama", 3, tied=False)
    permits = packed(untied, folder / "head-bundle", parties, permit_head=True)
    lora_return(permits, folder / "head-lora", parties.data_owner, head=0.1)
    full_return(permits, folder / "head-full", parties.data_owner, head=0.1)
    last, *earlier = (lora_return(bundle, folder / f"r{seed}", parties.data_owner, seed=seed) for seed in range(3))
    with_earlier(last, earlier, parties.data_owner, scores=[1.5, 1.25, 1.0])
    last.folder.rename(folder / "checkpoints")
    bottleneck_return(bundle, folder / "width-9", parties.data_owner, width=9)
    only_lora = packed(base, folder / "only-lora", parties, keep=1, methods=("lora",), max_rank=8)
    full_return(only_lora, folder / "forbidden-full", parties.data_owner)
    lora_return(bundle, folder / "rank-9", parties.data_owner, rank=9)
    mallory, carol = Home(folder / "mallory-home"), Home(folder / "carol-home")
    mallory.create_identity("mallory")  # whom nobody trusts
    parties.owner.trust("carol", carol.create_identity("carol").public_key)  # another customer of the owner
    parties.data_owner.trust("carol", carol.identity().public_key)
    ledger = (folder / "acme-home" / "ledger.sqlite").read_bytes()
    taken = intake(folder / "lora", parties.owner)
    plug_in(Base(base), taken, folder / "plugged", PlugInSpec(as_="adapter"), parties.owner)
    (folder / "acme-home" / "ledger.sqlite").write_bytes(ledger)  # as if it had never happened
    return folder


@pytest.fixture
def lab(honest: Path, tmp_path: Path) -> Lab:
    """A fresh copy of the honest exchange, to be spoiled."""
    folder = Path(shutil.copytree(honest, tmp_path / "lab"))
    return Lab(folder, Parties(Home(folder / "acme-home"), Home(folder / "hospital-home")))
