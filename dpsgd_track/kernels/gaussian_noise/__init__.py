"""Gaussian noise that is a function of a key and an element's index alone.

Philox 4x32-10 (Salmon et al., 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") turns a key of
64 bits and a counter of 128 bits into 4 words. Elements 4 j to 4 j + 3 of a parameter take the
words of counter (j, nonce), whichever rank holds them; each pair of words u, v gives two normals by
Box and Muller (1958):

    r = sqrt(-2 ln((u + 1) / 2^32)),  a = 2 pi v / 2^32,  z = r cos a, r sin a

In one pass over a shard, x becomes x + std z.
"""

from dpsgd_track.kernels.gaussian_noise.reference import Key, add_gaussian, philox, standard_normal

__all__ = ["Key", "add_gaussian", "philox", "standard_normal"]
