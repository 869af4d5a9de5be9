"""`python -m headwise` is the headwise command."""

from .cli import main

main()
