"""A few +-1 projections of a tensor, the same however the tensor is sharded.

s_k = sum_e r_k(e) x_e with r_k(e) = q(parameter, block, k) R(k, position) for element e at that
position of that block: one fixed matrix R of signs for all blocks, and one more sign for each
block, so that the signs of any two elements are uncorrelated. E[s_k^2] = ||x||^2 (Achlioptas,
2003). As the map is linear, the difference of two sketches estimates the distance of two tensors:
equal norms do not hide a different direction.
"""

from dpsgd_track.kernels.sketch.reference import NUM_PROJECTIONS, norm_and_sketch, signs_of

__all__ = ["NUM_PROJECTIONS", "norm_and_sketch", "signs_of"]
