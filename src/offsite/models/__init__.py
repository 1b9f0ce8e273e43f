"""Model families: the table, families derived from a model, loading, and the module kinds that a bundle may declare."""

import os

# Read by transformers when it is imported: some classes would fetch kernels, which are code, from the hub.
os.environ.setdefault("USE_HUB_KERNELS", "NO")
