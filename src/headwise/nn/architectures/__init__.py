"""What lives between layers: whose keys and values they read, which blocks run and how often. One file an architecture."""
