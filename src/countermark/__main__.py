"""`python -m countermark`: the command line, for machines without the script on their path."""

from countermark.cli import main

if __name__ == "__main__":
    main()
