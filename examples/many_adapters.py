# %% [markdown]
# # Many plug-ins on one served base
#
# Two data owners tuned the same base. Their plug-ins are PEFT adapters, so one copy of the base in memory serves both:
# each request names its adapter. Nothing of offsite is needed where the model is served.
#
# Run it as a script (`python examples/many_adapters.py`), or cell by cell in an editor that knows `# %%`. Everything
# goes to the folder `offsite-adapters`. The model is a tiny random one; put your own in its place.

# %%
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import offsite
from offsite.study.demos.tiny_base import tiny_base

folder = Path("offsite-adapters")
folder.mkdir()

# %% [markdown]
# ## Two tunings
#
# What `examples/whole_chain.py` shows step by step, once for each data owner.

# %%
acme = offsite.Home(folder / "acme-home")
acme_key = acme.create_identity("acme").public_key
base = tiny_base(folder / "base", "llama", 4)


def plug_in_for(name: str, answer: str) -> Path:
    """Let one data owner tune on rows with this answer; returns the folder of the plug-in."""
    home = offsite.Home(folder / f"{name}-home")
    acme.trust(name, home.create_identity(name).public_key)
    home.trust("acme", acme_key)
    rows = [{"prompt": f"Question {i}:", "completion": f" {answer}"} for i in range(16)]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pack = offsite.PackSpec(prune_by="magnitude", heal="none")
    offsite.pack(base, folder / f"{name}-bundle", name, pack, acme)
    bundle = offsite.verify_bundle(folder / f"{name}-bundle", home)
    tune = offsite.TuneSpec(rank=8, epochs=8, lr=1e-2)
    offsite.tune(bundle, data, folder / f"{name}-return", tune, home)
    returned = offsite.intake(folder / f"{name}-return", acme)
    return offsite.plug_in(base, returned, folder / f"{name}-plugged", offsite.PlugInSpec(), acme).folder


plugged = {"hospital": plug_in_for("hospital", "yes, doctor"), "clinic": plug_in_for("clinic", "no, nurse")}

# %% [markdown]
# ## One base, both adapters
#
# The first adapter makes the PEFT model, each further one is loaded into it. An adapter has a few per cent of the
# base's size.

# %%
tokenizer = AutoTokenizer.from_pretrained(base.folder)
model = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(base.folder), plugged["hospital"], adapter_name="hospital"
)
model.load_adapter(plugged["clinic"], adapter_name="clinic")
model.eval()

# %% [markdown]
# ## A request names its adapter
#
# `set_adapter` switches all layers; it copies nothing. `disable_adapter` is the base.


# %%
@torch.no_grad()
def loss_of(prompt: str, answer: str) -> float:
    """The loss of an answer in nats per token, with the adapter that is set."""
    asked = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    answered = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([asked + answered])
    labels = torch.tensor([[-100] * len(asked) + answered])  # the prompt is not scored
    return float(model(input_ids=ids, labels=labels).loss)


losses: dict[tuple[str, str], float] = {}
for answer in (" yes, doctor", " no, nurse"):
    for name in plugged:
        model.set_adapter(name)
        losses[name, answer] = loss_of("Question 3:", answer)
    with model.disable_adapter():
        losses["base", answer] = loss_of("Question 3:", answer)
for (name, answer), loss in losses.items():
    print(f"{name:<9} {answer:<13} {loss:.3f}")

# %% [markdown]
# ## Requests of both in one batch
#
# `adapter_names` gives each row of a batch its adapter; `__base__` stands for none.

# %%
names = ["hospital", "clinic", "__base__"]
prompts = tokenizer(["Question 3:"] * 3, return_tensors="pt")
with torch.no_grad():
    logits = model(**prompts, adapter_names=names).logits[:, -1]  # (3, V)
for name, row in zip(names, logits, strict=True):
    print(f"{name:<9} goes on with {tokenizer.decode([int(row.argmax())])!r}")
