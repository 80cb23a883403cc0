"""The ladder: how an attention kernel gets fast, one idea a step. steps.py has the order; each step's file tells its idea.

The kernels compile, are cached and launch as the product's do (build/, runtime/); no plan, wheel or evidence knows of them.
"""
