"""The feature store: image features computed once, kept in chunks on disk, read by every method.

A store is a folder `<root>/<key>/` with `store.json` and one folder per chunk of items:

    store.json                     what the features depend on, and their shape; SHA-256 of that
    chunk-000000/features.npy      [n,E] as the encoder gives them, NOT normalised
                 tokens.npy        [n,1+P,D], on request
                 labels.npy        [n] int32 (-1: none), or [n,C] bool where images have several
                 chunk.json        ids and numbers of the n items, unreadable ones, SHA-256 of each file

The key is a hash of all that determines the values, so that another model, another preprocessing or other images are
another store and features are never stale. It is computed again from `store.json` and compared, as are all checksums;
a chunk whose items are not those of its place is none. A chunk is written beside its place and appears by one rename:
whatever happens to the process, a chunk is there whole or not at all.
"""

from jaxzs.features.extraction import extract
from jaxzs.features.settings import DTYPES, Extraction, key_of
from jaxzs.features.store import Chunk, FeatureStore, open_store

__all__ = ["DTYPES", "Chunk", "Extraction", "FeatureStore", "extract", "key_of", "open_store"]
