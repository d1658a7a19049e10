"""``python -m fsa_compile.cost``: the model's expressions, each symbol's meaning, and the device table."""

from .text import describe

if __name__ == "__main__":
    print(describe())
