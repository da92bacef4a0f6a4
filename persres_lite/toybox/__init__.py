"""A small photo studio of toys. Nothing here imports the rest of the package.

=============  =================================================================
`world`        what can be in a picture, and its caption
`render`       how it looks, with the exact mask of each object
`models`       the parts of the text-to-image model and its judges, untrained
`judge`        how its pictures are scored
`inverse`      the renderer as judge: which paint explains a picture best
`concepts`     the ten shipped toys and their reference pictures
=============  =================================================================
"""
