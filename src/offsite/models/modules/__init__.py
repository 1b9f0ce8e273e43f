"""The closed list of module kinds that a manifest may declare: built by this code, never by what stands in data."""
