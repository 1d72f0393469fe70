"""The way in from Python: a step's settings, its training in this process, the run it came to."""
