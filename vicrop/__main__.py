"""python -m vicrop: the command `vicrop`, also where it is not installed."""

from vicrop.cli import main

main()
