"""The views, by name. Imports nothing, so that a command line can be refused before anything is loaded."""

from typing import Literal, get_args

# what a kernel's scores, its softmax, and its product with the values made of what they were given
View = Literal["scores", "softmax", "pv"]
VIEWS: tuple[View, ...] = get_args(View)
