"""Published methods in which a network teaches itself, on the engine and the networks of the other arms.

One file each, with formula, source, and what differs from there.
"""
