"""A reward function in TRL's signature."""


def brief(completions, **columns):
    """1 for a response of up to 12 characters, else 0."""
    return [float(len(text) <= 12) for text in completions]
