"""Run the command line by `python -m countermark`, without the script on the path."""

from countermark.cli import main

if __name__ == "__main__":
    main()
