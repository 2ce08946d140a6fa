"""The emulator that runs the real CUDA kernels on the CPU, one fiber for each CUDA thread."""
