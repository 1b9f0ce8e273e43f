"""Files: atomic writes, locks, and safetensors access by tensor name and byte range. Torch-free."""
