"""How the shipped Toybox is made, from nothing: ``make pretrain``. In a checkout only; the package does without it."""
