"""The model owner's steps: import a model, pack a bundle, take in a return, plug it in."""
