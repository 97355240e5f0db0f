"""Pictures -> metrics -> one reward a rollout -> group advantages. A new reward: one file, one line in registry.py."""
