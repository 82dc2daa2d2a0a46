"""The commands. `main.main` is the console script.

Imports any room, each when it is asked for; nothing imports it.
"""
