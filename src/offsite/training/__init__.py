"""The training of a network: the loop, master weights, schedule, resume points and the log."""
