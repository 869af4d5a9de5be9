"""The small parts of a read: masks, biases, scores, normalizers and edits; one file each."""
