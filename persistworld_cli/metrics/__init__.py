"""Images -> metrics -> one reward per rollout. A new metric: one file, one line in registry.py."""
