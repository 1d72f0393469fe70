"""Memory, time and cost of a step, computed before it runs."""
