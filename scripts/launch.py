"""Set SIGMA up on this machine and run it: `python scripts/launch.py train`, `test`, `exec -- CMD`.

Any Python must be able to read this file, or an old one would answer with a SyntaxError where the
user needs a line that names the mend: so nothing here is newer than Python 2.7, and the work is
in launcher.py, environment.py, installer.py and packages.py beside it. Standard library only, for
it runs before anything is installed.
"""

import os
import sys

OLDEST, NEWEST = (3, 11), (3, 13)
WRONG_PYTHON = (
    "launch: SIGMA runs on Python 3.11, 3.12 or 3.13 and this is Python {found}: "
    "install one of them and start it as `{example} scripts/launch.py`\n"
)


def main(arguments):
    """Check the Python version, then hand over; returns the exit code."""
    if not OLDEST <= tuple(sys.version_info[:2]) <= NEWEST:
        found = ".".join(str(part) for part in sys.version_info[:3])
        example = "py -3.13" if sys.platform == "win32" else "python3.13"
        sys.stderr.write(WRONG_PYTHON.format(found=found, example=example))
        return 2
    # The folder of this file is what Python put first; the packages of the project are one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from scripts.launcher import launch

    return launch(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
