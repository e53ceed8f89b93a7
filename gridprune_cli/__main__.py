"""`python -m gridprune_cli` is `gridprune`."""

from gridprune_cli.cli.app import main

main()
