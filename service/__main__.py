"""`python -m service` is `sluice`."""

from service.commands.cli import main

main()
