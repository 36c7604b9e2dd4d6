"""Client of OpenAI-compatible servers, and parsing of OpenAI requests and responses."""
