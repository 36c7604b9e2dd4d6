"""Rewards: a named, versioned number for every response, made of what one or several scorers say.

A scorer maps groups to one number, or a missing one, per response. `stage.run_reward` runs them
over a dataset and adds the result as a sidecar: tokens are never written, and responses never
sampled, again.
"""
