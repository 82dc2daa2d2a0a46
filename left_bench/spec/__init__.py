"""The contract between all rooms: a cell, its record, the events of a run, the kinds of task.

Imports `core` alone. A run passes through it as data: `Cell` goes in, `Record` comes out.
"""
