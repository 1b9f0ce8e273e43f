"""How the blocks that stay are compressed, one method a file."""
