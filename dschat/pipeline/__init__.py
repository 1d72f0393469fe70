"""Several programs in turn, from one file: checked together, resumed where they stopped."""
