"""The party that owns the data: it tunes a bundle on its own machine, and sends back only the trained tensors."""
