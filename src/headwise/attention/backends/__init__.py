"""Ways to execute a read. Each module has three functions of a read and its operands:

`refuses` (why it cannot run it, or None), `shuns` (why the planner passes it over although it could, or None: then it runs
only where it is named), and `run`.
"""
