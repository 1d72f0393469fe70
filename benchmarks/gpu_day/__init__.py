"""What a machine with a GPU makes of this project: `python -m benchmarks.gpu_day`."""
