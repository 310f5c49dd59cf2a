"""Recipes for experiments with the model that ships: one short file each, read from top to bottom.

Each runs by itself, in the root of the repository: `python -m tools.examples.logit_lens`. Its
docstring shows what it prints.

The texts are in the public domain. `tale.txt` is the beginning of "The Frog-King" by the Brothers
Grimm, after the translation by Margaret Hunt (1884); `law.txt`, sections 8 and 9 of Article I of
the Constitution of the United States.
"""
