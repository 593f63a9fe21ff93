"""`python -m fusemount` is the command fusemount."""

from fusemount.cli import main

if __name__ == "__main__":
    main()
