"""How hypothesis searches here: without deadlines, without a database, the same on every run."""

from hypothesis import settings

settings.register_profile("quick", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("quick")
