"""The wire: manifests, signatures, sealing, verifying; the only code about it that both parties share. Torch-free."""
