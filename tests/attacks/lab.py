"""Where attacks are tried: a copy of an honest exchange, and the parties in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts import sign_again
from offsite.protocol.artifacts import Bundle, Return
from offsite.protocol.home import Home
from offsite.protocol.manifest import BundleManifest
from offsite.protocol.signing import Identity
from offsite.protocol.verify import read_unverified, verify_bundle, verify_return
from tiny import Parties


@dataclass(frozen=True)
class Lab:
    folder: Path
    parties: Parties

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def lora(self) -> Path:
        return self.folder / "lora"

    @property
    def full(self) -> Path:
        return self.folder / "full"

    @property
    def owner(self) -> Identity:
        return self.parties.owner.identity()

    @property
    def data_owner(self) -> Identity:
        return self.parties.data_owner.identity()

    @property
    def mallory(self) -> Identity:
        return Home(self.folder / "mallory-home").identity()

    @property
    def carol(self) -> Identity:
        return Home(self.folder / "carol-home").identity()

    def sign_bundle(self, **options: Any) -> None:
        """The owner is the hostile party."""
        sign_again(self.bundle, self.owner, **options)

    def sign_lora(self, **options: Any) -> None:
        """The data owner is the hostile party."""
        sign_again(self.lora, self.data_owner, **options)

    def sign_full(self, **options: Any) -> None:
        sign_again(self.full, self.data_owner, **options)

    @property
    def encoder_full(self) -> Path:
        return self.folder / "encoder-full"

    def sign_encoder_full(self, **options: Any) -> None:
        sign_again(self.encoder_full, self.data_owner, **options)

    def parent(self, bundle: str = "bundle") -> BundleManifest:
        """The manifest that the owner's ledger holds: the honest one."""
        manifest = read_unverified(self.folder / bundle)
        assert isinstance(manifest, BundleManifest)
        return manifest

    def check(self, target: str) -> Bundle | Return:
        """What the other party does with a bundle, such as "gpt2-bundle", or a return, such as "lora"."""
        if target.endswith("bundle"):
            return verify_bundle(self.folder / target, self.parties.data_owner)
        bundles = {"bitfit": "gpt2-bundle", "encoder-full": "encoder-bundle"}
        bundles |= dict.fromkeys(("every-lora", "every-bitfit"), "every-gpt2-bundle")
        parent = self.parent("head-bundle" if target.startswith("head-") else bundles.get(target, "bundle"))
        return verify_return(self.folder / target, self.parties.owner, parent)
