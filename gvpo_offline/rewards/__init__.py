"""Rewards: a named, versioned number for every response, computed by one or several scorers.

A scorer returns one number, or none, for each response of a group. `stage.run_reward` runs the
scorers over a dataset and adds the rewards as a sidecar; the token files are not rewritten.
"""
