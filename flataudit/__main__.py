"""`python -m flataudit` is the command line."""

from flataudit.cli import main

if __name__ == "__main__":
    main()
