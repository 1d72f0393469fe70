"""Pure functions of tensors: losses, returns, advantages."""
