"""The measurement subsystem: shapes, contenders, the one timer, the artifact it fills and the views made from it.

Nothing here is imported by `import flashcore`; the command line and the evidence import the module they need.
"""
