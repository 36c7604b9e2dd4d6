"""OpenAI-compatible servers, for whoever has something to ask them: samplers, judges."""
