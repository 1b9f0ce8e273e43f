"""The backend of CUDA devices: kernels of other projects (torch's flash attention, and liger-kernel if installed)."""
