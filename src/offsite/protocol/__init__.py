"""The format of exchanged folders: artifacts, manifests, signatures, and the rules that verify them. Torch-free."""
