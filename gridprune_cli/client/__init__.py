"""The commands' way to a server of the same version: it has the model, and they need neither torch nor Pillow.

`protocol` is what both sides know, `connection` carries it, `session` finds out whether a server does what this process
would, and `remote` is what the commands work with in place of a pipeline of their own.
"""
