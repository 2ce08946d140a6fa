"""What a GPU would make of the CUDA kernels, found without one. `python -m gpu_model --help`; docs/gpu-model.md."""
