"""Toybox: a small photo studio of toys, and the text-to-image model that is trained on it.

Apart from the core: nothing here imports the rest of the package, and the core never imports this.

=============  =================================================================
`world`        what can be in a picture, and its caption
`render`       how it looks, with the exact mask of each object
`judge`        how its pictures are scored
`pretrain`     how the shipped model and its judges were trained (``make pretrain``): the order
               of the stages, which stand in `train_judge`, `train_clip`, `train_vae` and
               `train_unet`; `trainer` is their loop, `ship` writes what they leave
=============  =================================================================
"""
