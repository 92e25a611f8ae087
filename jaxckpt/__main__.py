"""`python -m jaxckpt`, the same as the command `jaxckpt`."""

from jaxckpt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
