"""Model families: the table, detection, loading, and the module kinds that a bundle may declare."""
