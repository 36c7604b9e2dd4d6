"""The reference's log-probs: scored by a model of its own, or by the policy's base in training."""
