"""Growth: a large model's parameters, gradients and optimizer state as linear functions of a small model's.

    Θ'_k = Σ_j w_kj · O Θ_j Iᵀ

Files, from the maps to what uses them:

    maps.py                    w, O and I: how layers and axes grow
    width.py, depth.py         methods for axes, methods for layers
    methods.py                 both by name
    recipe.py                  all that says how one model becomes another
    dims.py                    what that means for each dim of a parameter
    operator.py                the formula on one box of one parameter
    dense.py, noise.py         boxes by learned maps; new entries that are random
    grow.py                    the formula on all shards of a model, streaming over the source
    exchange.py                the ranges of the source that a rank's shards copy
    moments.py                 the formula for Adam's moments, with the step sizes that fit them
    ligo.py                    maps that are learned
    ligo_maps.py, ligo_file.py where these start; as files
    verify.py                  what a grown model must satisfy
    bootstrap.py               which small model to train first, where there is none
    offline.py                 from one folder to another
"""
