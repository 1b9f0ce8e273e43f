"""What a command imports, seen in a fresh process."""

import subprocess
import sys

HEAVY = {"torch", "transformers", "peft", "accelerate"}
_RUN = """
import sys
from offsite.cli import main
code = main(sys.argv[1:])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
sys.exit(code)
"""


def modules_after(*words: object) -> set[str]:
    command = [sys.executable, "-c", _RUN, *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())
