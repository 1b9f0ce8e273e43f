"""Model families: the table of supported ones, detection, loading, and the module kinds that a bundle may declare."""
