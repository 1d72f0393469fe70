"""The same training by this project and by others, side by side: `python -m benchmarks.peers`."""
