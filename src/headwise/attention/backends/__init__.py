"""Ways to execute a read. Each module has `refuses(read, x) -> str | None` (why it cannot run it) and `run(read, x)`."""
