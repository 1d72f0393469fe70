"""From names of data sets to batches: sources, readers, splits, tokenising, collators, loaders."""
