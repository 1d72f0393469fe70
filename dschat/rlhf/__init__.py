"""PPO: rollouts, returns, updates, and the models in their roles."""
