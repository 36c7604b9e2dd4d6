"""Scores from files of people's ratings, ranks and votes."""
