"""`python -m halfbyte`, the same as the command `halfbyte`.

It owns nothing else and must not know what the command does.
"""

from halfbyte.cli import main

if __name__ == "__main__":
    main()
