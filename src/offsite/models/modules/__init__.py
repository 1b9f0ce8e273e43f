"""The fixed list of module kinds that a config may declare; this code builds them, data never names code to run."""
