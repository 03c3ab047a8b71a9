"""The art world: pictures of named things by several emoji artists, composed into images and scenes from a seed.

The checkpoint "art" has seen nothing but what comes from here, drawn by the artists of `sprites.TRAINED`; the artist of
`sprites.UNSEEN` draws its tests: another hand, another rendering. The drawings are read from public packages
(`python -m experiments.art_world.sprites`).
"""
