"""Studies and demos: they play both parties on one machine, run the whole protocol, and measure the results."""
