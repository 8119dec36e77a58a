"""`python -m aligndistil` is the command `aligndistil`."""

from aligndistil.cli import main

if __name__ == "__main__":
    main()
