"""Where programs nobody has read are run: what stands between them and the host.

``supervisor`` is a process of the host's user that runs one program after the other, ``cell`` builds
what each is locked into, ``kernel`` asks Linux for it, and ``runner`` is the first thing that runs inside.
They need no package but this one: a supervisor starts in a bare interpreter.
"""
