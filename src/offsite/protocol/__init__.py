"""The exchange format: artifacts, manifests, signatures, and the rules that verify received folders. Torch-free."""
