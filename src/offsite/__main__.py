"""Run the command line with `python -m offsite`."""

import sys

from offsite.cli import main

if __name__ == "__main__":
    sys.exit(main())
