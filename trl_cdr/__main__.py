"""`python -m trl_cdr ...` is `trl-cdr ...`."""

from .cli import main

if __name__ == "__main__":
    main()
