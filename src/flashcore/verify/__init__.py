"""Verification: cases, the float64 oracle's bounds on them, poisoned memory, and the record of what passed.

cases.py and the files *_cases.py say what is run, inputs.py makes its tensors, suite.py runs and judges, tolerance.py holds
the only tolerances, mutations.py tests the suite itself, record.py is the JSON that evidence is made of.
"""
