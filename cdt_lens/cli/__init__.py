"""The command line: one file for each family of commands; `app.py` registers them."""
