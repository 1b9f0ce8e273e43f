"""Both parties on one machine: what the whole protocol gives, measured."""
