"""The wire: artifacts, manifests, signing, and the rules that verify what the other party sent. Torch-free."""
