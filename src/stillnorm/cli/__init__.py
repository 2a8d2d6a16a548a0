"""The command line: loads what the user names, calls the library, prints. It computes nothing.

Nothing here imports torch before a command runs: `stillnorm --help` answers at once.
"""
