"""Mechanisms and mixers whose heads weigh keys by a normalised score."""
