"""What every room uses: errors, paths, files, dates, units, interrupts.

Imports no other room, and no package that takes long to import.
"""
