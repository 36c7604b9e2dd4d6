"""Inputs of an import: finds files and data sets, hashes their content, and reads their rows."""
