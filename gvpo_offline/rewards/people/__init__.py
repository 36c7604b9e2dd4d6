"""People's ratings, rankings and votes, from files, made into numbers."""
