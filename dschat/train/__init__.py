"""Training: settings of a run, preparation, engine, evaluation, metrics, checkpoints."""
