"""The text or pictures that blocks are selected, pruned, narrowed and healed on."""
