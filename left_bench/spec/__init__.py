"""The contract between all rooms: a cell, its record, the events of a run, the kinds of task.

Imports only `core`. A run takes a `Cell` and returns a `Record`, both defined here.
"""
