"""Sources, splits, tokenised sets, batches."""
