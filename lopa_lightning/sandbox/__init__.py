"""Runs programs that nobody has read, behind what keeps them from the host.

``run`` asks ``supervisor``, a process of the host's user that runs one program after the other. ``walls`` locks it in,
``kernel`` asks Linux for that, and ``runner`` is the first code that runs inside. They need no package but this one:
a supervisor starts in a bare interpreter.
"""
