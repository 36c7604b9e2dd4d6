"""Campaigns that attack the commands from outside: kills, corruptions, hostile inputs, fuzzing."""
