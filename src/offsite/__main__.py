"""`python -m offsite` is the command line."""

import sys

from offsite.cli import main

if __name__ == "__main__":
    sys.exit(main())
