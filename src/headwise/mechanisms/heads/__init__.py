"""Mixers that differ in what their heads share, and in which of them run."""
