"""Training: the loop, master weights, schedule, resume points and the log."""
