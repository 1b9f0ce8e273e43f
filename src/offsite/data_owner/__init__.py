"""The party that owns the data: it tunes a bundle at home and sends back the trained tensors, and nothing else."""
