"""Makes blocks narrower: removes attention heads, MLP neurons and experts; each rule that chooses has its own file."""
