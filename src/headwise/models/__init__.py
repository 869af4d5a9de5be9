"""Opening any model: what its heads are, capture, running under a plan. The only room that knows transformers."""
