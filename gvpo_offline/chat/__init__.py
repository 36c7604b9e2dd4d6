"""Chat messages to token ids: what a policy would emit, by its tokenizer's chat template."""
