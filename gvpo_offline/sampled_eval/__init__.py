"""Judging a policy by fresh answers to held-out prompts.

    held-out groups -> distinct prompts -> answers of the policy -> rewards, log-ratios -> means

The answers are drawn in this process, with seeds that depend on the prompt and the answer's number
alone: two policies are compared on the same random numbers. Any reward configuration scores them
that needs nothing but texts. The mean log-ratio to the reference over the sampled tokens estimates
the KL divergence, so that reward - beta KL, which GVPO maximises, is measured and not predicted.
"""
