"""Files: atomic writes, locks, and safetensors by name and byte range. Torch-free."""
