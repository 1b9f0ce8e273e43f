# %% [markdown]
# # Both parties, from a model to a plug-in
#
# Run it as a script (`python examples/whole_chain.py`), or cell by cell in an editor that knows `# %%`. Everything goes
# to the folder `offsite-example`. The model is a tiny random one, so that it takes seconds and needs no network; put
# your own in its place, or one that `offsite models get smollm2 --out base/` fetches.

# %%
import json
from pathlib import Path

import offsite
from offsite.study.demos.tiny_base import tiny_base

folder = Path("offsite-example")
folder.mkdir()

# %% [markdown]
# ## Keys
#
# Each party makes a key once, and trusts the key that the other one sent. On the command line: `offsite init`, then
# `offsite trust add`.

# %%
acme, hospital = offsite.Home(folder / "acme-home"), offsite.Home(folder / "hospital-home")
acme_key = acme.create_identity("acme").public_key
hospital_key = hospital.create_identity("hospital").public_key
acme.trust("hospital", hospital_key)
hospital.trust("acme", acme_key)

# %% [markdown]
# ## The model owner packs a bundle
#
# The first and last blocks go out as they are; the blocks between them are compressed.

# %%
base = tiny_base(folder / "base", "llama", 4)
packed = offsite.pack(base, folder / "bundle", "hospital", offsite.PackSpec(), acme)
print("may be trained:", packed.manifest.split.trained, "of", packed.manifest.split.blocks, "blocks")

# %% [markdown]
# ## The data owner tunes it
#
# The bundle is verified first. The rows stay here: the return holds the adapter alone.

# %%
rows = [{"prompt": f"What comes after {i}?", "completion": f" {i + 1} does."} for i in range(48)]
for name, part in (("train", rows[:32]), ("test", rows[32:])):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")

bundle = offsite.verify_bundle(folder / "bundle", hospital)
spec = offsite.TuneSpec(method="lora", rank=8, epochs=3, lr=5e-3)
returned = offsite.tune(bundle, folder / "train.jsonl", folder / "return", spec, hospital)
print("sent back:", len(returned.manifest.tensors), "tensors")

# %% [markdown]
# ## The model owner plugs it in
#
# The return is verified against the bundle that the ledger has. The plug-in is an ordinary PEFT adapter for the base.

# %%
taken = offsite.intake(folder / "return", acme)
plugged = offsite.plug_in(base, taken, folder / "plugged", offsite.PlugInSpec(), acme)

# %% [markdown]
# ## Did it help?
#
# Both models on the same held-out rows, with paired intervals. On the command line: `offsite compare`.

# %%
found = offsite.compare(
    [offsite.Contestant("base", base), offsite.Contestant("plug-in", base, plugged)],
    folder / "test.jsonl",
    offsite.EvalSpec(),
)
for model in found.models:
    print(f"{model.name}: {model.loss:.3f} nats per token")
for difference in found.differences:
    print(f"{difference.metric}: {difference.value:+.3f}, {difference.verdict}")
