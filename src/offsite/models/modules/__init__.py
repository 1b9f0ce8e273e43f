"""The module kinds that a bundle's config may declare: a fixed list, so that a bundle never names code to run."""
