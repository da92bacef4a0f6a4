"""A small photo studio of toys. Nothing here imports the rest of the package.

=============  =================================================================
`world`        what can be in a picture, and its caption
`render`       how it looks, with the exact mask of each object
`judge`        how its pictures are scored
`concepts`     the ten shipped toys and their reference pictures
=============  =================================================================
"""
