"""The contract between all rooms: a cell, its record, the events of a run, the kinds of task.

Imports `core` alone. A run takes a `Cell` and returns a `Record`, both defined here.
"""
