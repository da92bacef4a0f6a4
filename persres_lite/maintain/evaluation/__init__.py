"""What `python -m persres_lite.maintain.evaluate` is made of."""
