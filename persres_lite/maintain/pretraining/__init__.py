"""The stages that train Toybox; `__main__` runs them in their order."""
