"""`python -m streamindex_service`: the command line, as `streamindex`."""

from streamindex_service.cli import main

if __name__ == "__main__":
    main()
