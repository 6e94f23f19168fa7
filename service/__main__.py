"""`python -m service` runs the command `sluice`."""

from service.commands.cli import main

main()
