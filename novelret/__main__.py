"""`python -m novelret`, for instance under torchrun."""

from novelret.cli import run

if __name__ == "__main__":
    run()
