"""Mixers that are made for what decoding has to keep: hidden states once, or some tokens only."""
