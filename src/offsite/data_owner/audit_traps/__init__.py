"""The audit for traps: searches a bundle for weights that would write words of the private rows into the return."""
