"""How heads may be cached; one file a rule."""
