"""Rewards: pictures -> metrics -> one reward a rollout -> group advantages. A new one: one file, one line in registry.py."""
