"""Say in one sentence what is missing before `make` creates the environment."""
import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"diffusionbook needs Python 3.11, 3.12 or 3.13, and {sys.executable} is Python "
             f"{sys.version.split()[0]}; install one of them and name it: make PYTHON=python3.12 book")
try:
    import ensurepip  # noqa: F401  (Debian and Ubuntu ship it apart from Python itself)
    import venv  # noqa: F401
except ImportError:
    sys.exit("Python's venv is missing; install it with: sudo apt install python3-venv")
