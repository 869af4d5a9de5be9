"""Mechanisms that keep a state instead of keys and values, and others whose cost is linear in length."""
