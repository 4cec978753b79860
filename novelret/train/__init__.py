"""Policy, rewards, objectives and the trainer."""
