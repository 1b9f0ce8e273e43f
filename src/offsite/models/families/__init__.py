"""Model families: the tables of known ones, and families that are read off a model and declared in a bundle."""
