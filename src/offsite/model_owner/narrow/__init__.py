"""Makes blocks narrower: removes attention heads and MLP neurons; each rule that chooses them has its own file."""
