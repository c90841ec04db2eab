"""`python -m qkernels.cli`."""

from qkernels.cli import main

if __name__ == "__main__":
    main()
