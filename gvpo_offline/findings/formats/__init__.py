"""Findings as text, JSON, SARIF and JUnit XML."""
