"""Debug views: what a kernel's stages made of one input, each by an oracle of its own, and where the first wrong tile lies.

A kernel records all of its stages in one launch (kernels/view.py, kernels/hopper/view.py), so that each can be judged by the
very numbers that it was given: the weights by the scores that they were made of, the output by the weights. A mistake is then
seen in the stage that made it, and not in those after it.
"""
