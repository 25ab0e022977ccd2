"""`python -m oepy` is the same as `oepy`."""

from oepy.cli import main

if __name__ == "__main__":
    main()
