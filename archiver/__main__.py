"""`python -m archiver` is the same as `archiver`."""

from archiver.cli import main

main()
