"""The backend of CPUs: faster modules, attention, dropout and softmax, and micro-batches side by side."""
