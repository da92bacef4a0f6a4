"""The stages that train the second edition; `__main__` runs them in their order."""
