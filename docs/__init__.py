"""Pages of the documentation, and the programs that make parts of them."""
