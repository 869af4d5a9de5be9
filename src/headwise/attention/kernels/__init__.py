"""Triton kernels for NVIDIA GPUs; with TRITON_INTERPRET=1 they run, slowly, on the CPU. Only this folder imports triton."""
