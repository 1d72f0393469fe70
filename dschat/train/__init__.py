"""What every training step shares: engine, start-up, evaluation, metrics, checkpoints."""
