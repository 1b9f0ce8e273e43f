"""Kernels for CUDA devices, all of them kept by others: torch's flash attention, and liger-kernel where installed."""
