"""Caches for many requests of one model: rows that fork, go, and share pages."""
