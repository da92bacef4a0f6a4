"""Toybox at 128 pixels, while it learns: a world, models and judges of its own, and the stages that train them.

What ships under ``persres_lite.toybox`` is the first edition, at 64 pixels, and everything else uses that one. This one
takes its place when its U-Net has seen enough; until then its half-trained weights are kept in ``data/second-edition``,
and ``python -m persres_lite.maintain.second_edition.pretraining --further`` goes on from them.
"""
