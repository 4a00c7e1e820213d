"""Define the command line `cdt-lens`, with one file for each family of commands.

`app.py` registers the commands. Each command calls the same functions as a notebook would.
"""
