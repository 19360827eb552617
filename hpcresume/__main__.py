"""``python -m hpcresume``: the same as the ``hpcresume`` command."""

from hpcresume.cli import main

if __name__ == "__main__":
    main()
